"""Two layers that take a softmax or an exponential of a linear attention's state or output.

Unlisted types of the softmax-as-RNN paper, kept for comparison: neither compares pairs of tokens.

Reference: upstream `softmax_seq` and `softmax_seq2` of 2Mamba2Furious (arXiv 2507.23632).
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxmem.errors import KernelUnsupported
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn.cache import check_len
from jaxmem.nn.fields import check_choices
from jaxmem.nn.heads import check_even_heads, merge_heads, split_qkv
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, RMSNorm
from jaxmem.nn.rows import Last, Row, after, init_last, row_of, turned
from jaxmem.ops.dispatch import KERNELS, Implementation
from jaxmem.ops.linear_attention import LinearState, init_linear_state, linear_attention
from jaxmem.ops.norms import EPS_FLOAT32, at_least_float32
from jaxmem.shapes import Activations, Queries, SegmentIds

CLAMP = 5.0
"""Largest output before the exponential."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxStateConfig(MixerConfig):
    """What the exponential is taken of."""

    paper: ClassVar[str] = "softmax as RNN (arXiv 2507.23632)"
    parity: ClassVar[str] = "golden: `softmax_seq` and `softmax_seq2`"

    num_heads: int = 4
    """Heads; must divide the model width, an even number of channels each."""
    of: Literal["state", "output"] = "state"
    """state: a softmax over the key channels of the state (`softmax_seq`); output: an exponential
    of each output channel, then a norm (`softmax_seq2`)."""

    def __post_init__(self) -> None:
        """Check that `of` is known."""
        super().__post_init__()
        check_choices(self, "softmax_state")

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless heads have an even width."""
        check_even_heads(dim, self.num_heads, path)


class SoftmaxStateState(NamedTuple):
    """Sums over the tokens so far."""

    sums: LinearState
    last: Last


@register("softmax_state", SoftmaxStateConfig)
class SoftmaxState(Mixer):
    """A softmax of a linear attention's state, or an exponential of its output.

    M_t = (1/n_t) Σ_{j≤t} k_j v_jᵀ

    state: o_t[v] = Σ_c q_t[c] softmax_c(M_t[c, v]); output: RMSNorm(e^min(q_tᵀ M_t / sqrt(K), 5))

    Raises:
      KernelUnsupported: a kernel is asked for, of which `state` has none.

    Reference: upstream `softmax_seq` (state) and `softmax_seq2` (output).
    """

    config: SoftmaxStateConfig

    def __init__(self, config: SoftmaxStateConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, use_bias=False, init=init.weight, rngs=rngs)
        self.out = Linear(dim, dim, use_bias=False, init=init.residual, rngs=rngs)
        normed = config.of == "output"
        self.norm = RMSNorm(dim // config.num_heads, eps=EPS_FLOAT32) if normed else None

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> SoftmaxStateState:
        """Return the state before any token; its size does not depend on `max_len`."""
        check_len(max_len, "softmax_state")
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        heads, width = self.config.num_heads, self.dim // self.config.num_heads
        sums = init_linear_state(batch, heads, width, width, with_total=False, dtype=dtype)
        return SoftmaxStateState(sums, init_last(batch))

    def mix(
        self,
        x: Activations,
        state: SoftmaxStateState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run a row of tokens."""
        last = None if state is None else state.last
        row = row_of(x.shape[1], segment_ids, positions, last)
        q, k, v = split_qkv(self.qkv(x), self.config.num_heads)
        q, k = turned(q, row, "half"), turned(k, row, "half")
        start = None if state is None else state.sums
        count = row.count.astype(at_least_float32(x).dtype)[..., None, None]
        if self.norm is None:
            _check_implementation(implementation)
            y, sums = _read_states(q, k, v, count, row, start)
        else:
            read: Any = linear_attention(
                q,
                k,
                v,
                initial_state=start,
                segment_ids=row.ids,
                initial_segment=row.before,
                implementation=implementation,
            )
            mean = at_least_float32(read.y) / count
            y = jnp.exp(jnp.where(mean > CLAMP, CLAMP, mean))
            y, sums = self.norm(y), read.state
        if state is not None:
            state = SoftmaxStateState(sums, after(row, state.last))
        return MixerOutput(self.out(merge_heads(y).astype(x.dtype)), state, {})


def _check_implementation(name: Implementation) -> None:
    if name in KERNELS:
        raise KernelUnsupported(
            f"softmax_state with of='state' has no implementation {name!r}, only one loop over "
            "tokens. Use 'auto', 'xla' or 'reference', or of='output'."
        )


def _read_states(
    q: Queries, k: Queries, v: Queries, count: Array, row: Row, start: LinearState | None
) -> tuple[Array, LinearState]:
    """Read every token's own state, which has to be made for it: a step per token."""
    wide = at_least_float32(q).dtype
    batch, length, heads, width = q.shape
    if start is None:
        start = init_linear_state(batch, heads, width, width, with_total=False, dtype=wide)
    real = starts = jnp.zeros((batch, length), bool)
    if row.spans is None:
        real = ~real
    else:
        real, starts = row.spans.valid, row.spans.reset

    def step(memory: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, count, real, first = inputs  # [B H K] thrice, [B|1 1 1], [B] twice
        memory = jnp.where(first[:, None, None, None], 0.0, memory)
        written = k[..., None] * v[..., None, :]
        memory = memory + jnp.where(real[:, None, None, None], written, 0.0)
        weights = jax.nn.softmax(memory / count[..., None], axis=-2)
        return memory, jnp.einsum("bhk,bhkv->bhv", q, weights)

    tokens = (*(a.astype(wide) for a in (q, k, v)), count, real, starts)
    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in tokens)
    memory, y = lax.scan(jax.checkpoint(step), start.memory.astype(wide), tokens)
    return jnp.moveaxis(y, 0, 1), LinearState(memory, None)
