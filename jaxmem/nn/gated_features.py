"""Keys, values and bandwidths of Memory Mosaics v2, which depend on more than the distance in time.

Reference: Zhang and Bottou 2025, "Memory Mosaics at scale" (arXiv 2507.03285).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxmem.nn.features import ValueExtractor
from jaxmem.nn.heads import split_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear
from jaxmem.ops.norms import at_least_float32, l2_normalise
from jaxmem.ops.weighted_average import WeightedState, weighted_average
from jaxmem.shapes import Activations, Queries

BANDWIDTH_START = 1.5
BANDWIDTH_LIMIT = 10.0
"""Largest log of the two terms of the bandwidth."""
EXPONENT_START = 1.0 / 3.0
VALUE_SCALE_LIMIT = 15.0


class GatedKey(nnx.Module):
    """k_t = unit(S_t),  S_t = λ_t S_{t-1} + g_t W x_t,  g_t = e^{W_g x_t},  λ_t = e^{-|W_λ x_t|}.

    Gate and decay are one number per head. The sum may grow or shrink without bound, but not its
    direction, so it is taken as a weighted average with g in the logarithm. Keys are float32 or
    wider whatever the dtype of x, for the bandwidth multiplies their rounding.

    Reference: arXiv 2507.03285, "gated time-variant key".
    """

    def __init__(self, dim: int, num_heads: int, *, init: Init, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.projection = Linear(dim, dim, use_bias=False, init=init.weight, rngs=rngs)
        self.gate = Linear(dim, num_heads, use_bias=False, init=init.weight, rngs=rngs)
        self.decay = Linear(dim, num_heads, use_bias=False, init=init.weight, rngs=rngs)

    def __call__(
        self, x: Activations, state: WeightedState | None, **options: Any
    ) -> tuple[Queries, WeightedState]:
        """Return unit keys and the averages after the last token; `options` are the op's."""
        wide = at_least_float32(x)
        average, state = weighted_average(
            at_least_float32(split_heads(self.projection(x), self.num_heads)),
            self.gate(wide)[..., None],
            -jnp.abs(self.decay(wide))[..., None],
            initial_state=state,
            **options,
        )
        return l2_normalise(average), state


class LookAheadValue(ValueExtractor):
    """v_t = e^{min(|a|, 15)} unit(c u_t + (1 - c) u_{t+1}) per head, with u = W x.

    Reference: arXiv 2507.03285, appendix. The scale starts at a = 0, the tip of |a|, where the
    gradient is taken from the right; with the gradient 0 of some frameworks it would never move.
    """

    def __init__(self, dim: int, num_heads: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(
            dim, num_heads, "mix", kernel_size=1, shift=1, use_bias=False, init=init, rngs=rngs
        )
        self.scale = nnx.Param(jnp.zeros((num_heads,)))

    def scaled(self, features: Queries) -> Queries:
        """Bring features to the length of a value."""
        scale = jnp.exp(jnp.minimum(jnp.abs(self.scale[...]), VALUE_SCALE_LIMIT))
        return l2_normalise(features) * scale[:, None].astype(features.dtype)


class Bandwidth(nnx.Module):
    """β = β_1 n^α + β_0 for n readable pairs; β_i = e^{min(b_i, 10)}, α = min(|a|, 1), per head.

    The best width of a kernel shrinks as points accumulate, like a negative power of their number.

    Reference: arXiv 2507.03285, "adaptive bandwidth".
    """

    def __init__(self, num_heads: int):
        self.slope = nnx.Param(jnp.full((num_heads,), BANDWIDTH_START))
        self.offset = nnx.Param(jnp.full((num_heads,), BANDWIDTH_START))
        self.exponent = nnx.Param(jnp.full((num_heads,), EXPONENT_START))

    def __call__(self, pairs: Int[Array, "#B T"]) -> Float[Array, "#B T H"]:
        """Return β for the number of pairs that each query may read."""
        slope, offset = (
            jnp.exp(jnp.minimum(b[...], BANDWIDTH_LIMIT)) for b in (self.slope, self.offset)
        )
        exponent = jnp.minimum(jnp.abs(self.exponent[...]), 1.0)
        # Where nothing is readable β matters to nobody, and log 0 would poison the gradient.
        log_pairs = jnp.log(jnp.maximum(pairs, 1).astype(slope.dtype))
        return slope * jnp.exp(exponent * log_pairs[..., None]) + offset
