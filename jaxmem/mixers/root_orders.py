"""Taylor's sum of attention with fewer channels for higher orders, so that all states are alike.

The state of order i has (width of order i)^i numbers per value channel: with the root of the head's
width the second order's is no larger than the first's.

Reference: the hidden state compression experiments kept in 2Mamba2Furious (arXiv 2507.23632).
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn import cache
from jaxmem.nn.cache import KeyValueCache
from jaxmem.nn.heads import check_heads, merge_heads, split_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, RMSNorm
from jaxmem.nn.rows import Last, after, init_last, places_in_row, row_of
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.norms import rms_norm
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.rope import rope
from jaxmem.ops.segments import poison_rows
from jaxmem.shapes import Activations, SegmentIds

EPS = float(jnp.finfo(jnp.float32).eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootOrdersConfig(MixerConfig):
    """How many orders."""

    paper: ClassVar[str] = "softmax as RNN (arXiv 2507.23632)"
    parity: ClassVar[str] = "golden: polynomial kernel with shrinking per-order projections"

    num_heads: int = 2
    """Heads; must divide the model width into an even number of channels."""
    orders: int = 4
    """Highest power of the products."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless there are orders, and heads of an even width."""
        check_heads(dim, self.num_heads, path)
        if self.orders < 1:
            raise ConfigError(f"{path}.orders={self.orders}. Use 1 or more.")
        if (dim // self.num_heads) % 2:
            raise ConfigError(
                f"{path}.num_heads={self.num_heads} makes heads of {dim // self.num_heads} "
                "channels, which rope cannot turn in pairs. Use an even head width."
            )


class RootOrdersState(NamedTuple):
    """A cache, whose keys are those of all orders one after another."""

    cache: KeyValueCache
    last: Last


@register("root_orders", RootOrdersConfig)
class RootOrders(Mixer):
    """Taylor's sum of attention, with fewer channels for higher orders.

    o_t = RMSNorm(Σ_{j≤t} (1 + Σ_i (R q_t A_i · R k_j B_i)^i / i!) v_j), R the rotary positions.

    A_i and B_i map a head's K channels to K for i = 1 and to floor(sqrt(K)) above, made even, alike
    for all heads.

    Reference: upstream's polynomial kernel with root-sized orders.
    """

    config: RootOrdersConfig

    def __init__(self, config: RootOrdersConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        width = dim // config.num_heads
        self.qkv = Linear(dim, 3 * dim, use_bias=False, init=init.weight, rngs=rngs)
        self.out = Linear(dim, dim, use_bias=False, init=init.residual, rngs=rngs)
        self.of_queries, self.of_keys = (
            nnx.List(
                Linear(width, order, use_bias=False, init=init.weight, rngs=rngs)
                for order in _widths(width, config.orders)
            )
            for _ in range(2)
        )
        self.norm = RMSNorm(width, eps=EPS)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> RootOrdersState:
        """Return an empty cache for `max_len` tokens per row (required)."""
        size = cache.required_len(max_len, "root_orders")
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        width = self.dim // self.config.num_heads
        keys = sum(_widths(width, self.config.orders))
        heads = self.config.num_heads
        stored = cache.init_cache(batch, size, heads, keys, dtype, value_width=width)
        return RootOrdersState(stored, init_last(batch))

    def mix(
        self,
        x: Activations,
        state: RootOrdersState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run a row of tokens, or read a cache if there is a state."""
        last = None if state is None else state.last
        row = row_of(x.shape[1], segment_ids, positions, last)
        q, k, v = (
            split_heads(a, self.config.num_heads) for a in jnp.split(self.qkv(x), 3, axis=-1)
        )
        turned = jnp.broadcast_to(row.positions, x.shape[:2])
        queries = [rope(p(q), turned, layout="half") for p in self.of_queries]
        keys = jnp.concatenate([rope(p(k), turned, layout="half") for p in self.of_keys], axis=-1)
        places = places_in_row(row)
        if state is not None:
            stored, places = cache.stored(state.cache, keys, v, row.ids, row.spans)
            state = RootOrdersState(stored, after(row, state.last))
            keys, v = stored.keys.astype(x.dtype), stored.values.astype(x.dtype)
        y = jnp.zeros((), x.dtype)
        start = 0
        for number, query in enumerate(queries, 1):
            read = polynomial_attention(
                query,
                keys[..., start : start + query.shape[-1]],
                v,
                coefficients=_order(number),
                scale=1.0,
                places=places,
                implementation="reference" if implementation == "reference" else "auto",
            )
            y, start = y + read.y, start + query.shape[-1]
        y = rms_norm(y, self.norm.weight[...], eps=EPS)
        y = self.out(merge_heads(y).astype(x.dtype))
        if state is not None:
            y = poison_rows(cache.overrun(state.cache.length, state.cache.keys), y)
        return MixerOutput(y, state, {})


def _widths(width: int, orders: int) -> list[int]:
    """Return the channels of each order, an even number, for rope turns them in pairs."""
    root = max(2, math.isqrt(width) // 2 * 2)
    return [width, *([root] * (orders - 1))]


def _order(number: int) -> Array:
    """Return the coefficients of s^n / n!, and of the constant 1 with the first order."""
    constant = 1.0 if number == 1 else 0.0
    return jnp.asarray([constant, *[0.0] * (number - 1), 1.0 / math.factorial(number)])
