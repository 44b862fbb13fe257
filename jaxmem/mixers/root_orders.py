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

from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn import cache
from jaxmem.nn.cache import KeyValueCache
from jaxmem.nn.fields import check_at_least_one, check_choices
from jaxmem.nn.heads import check_even_heads, merge_heads, split_qkv
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, RMSNorm
from jaxmem.nn.rows import Last, after, documents, init_last, places_in_row, row_of, turned
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.norms import EPS_FLOAT32
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.segments import poison_rows
from jaxmem.shapes import Activations, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootOrdersConfig(MixerConfig):
    """How many orders."""

    paper: ClassVar[str] = "softmax as RNN (arXiv 2507.23632)"
    parity: ClassVar[str] = "golden: polynomial kernel with shrinking per-order projections"

    num_heads: int = 2
    """Heads; must divide the model width into an even number of channels."""
    orders: int = 4
    """Highest power of the products."""

    def __post_init__(self) -> None:
        """Check that there are orders."""
        super().__post_init__()
        check_choices(self, "root_orders")
        check_at_least_one(self, "root_orders", "orders")

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless heads have an even width."""
        check_even_heads(dim, self.num_heads, path)


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

    Reference: upstream's polynomial kernel with root-sized orders. Differs: upstream's root is not
      made even, 13 channels for K = 192 where there are 12 here, because rope turns pairs.
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
        self.norm = RMSNorm(width, eps=EPS_FLOAT32)

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
        q, k, v = split_qkv(self.qkv(x), self.config.num_heads)
        queries = [turned(p(q), row, "half") for p in self.of_queries]
        keys = jnp.concatenate([turned(p(k), row, "half") for p in self.of_keys], axis=-1)
        places = places_in_row(row)
        if state is not None:
            stored, places = cache.stored(state.cache, keys, v, *documents(row))
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
                implementation=implementation,
            )
            y, start = y + read.y, start + query.shape[-1]
        y = self.out(merge_heads(self.norm(y)).astype(x.dtype))
        if state is not None:
            y = poison_rows(cache.overrun(state.cache.length, state.cache.keys), y)
        return MixerOutput(y, state, {})


def _widths(width: int, orders: int) -> list[int]:
    """Return the channels of each order, even numbers, for rope turns them in pairs."""
    root = max(2, math.isqrt(width) // 2 * 2)
    return [width, *([root] * (orders - 1))]


def _order(number: int) -> Array:
    """Return the coefficients of s^n / n!, and of the constant 1 with the first order."""
    constant = 1.0 if number == 1 else 0.0
    return jnp.asarray([constant, *[0.0] * (number - 1), 1.0 / math.factorial(number)])
