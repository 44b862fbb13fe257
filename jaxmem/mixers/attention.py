"""Multi-head softmax attention, the baseline that every memory is compared with."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn import cache
from jaxmem.nn.heads import check_heads, merge_heads, split_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, check_dropout, dropout, weight_dropout
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.segments import last_real, poison_rows, spans
from jaxmem.shapes import Activations, RowInts, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Causal multi-head attention with the keys and values of every head its own."""

    paper: ClassVar[str] = "Vaswani et al. 2017 (arXiv 1706.03762)"
    parity: ClassVar[str] = "golden: nanoGPT's block and GPT, Library's GPT"

    num_heads: int = 4
    """Heads; must divide the model width."""
    dropout: float = 0.0
    """Dropout of the attention weights and of the output."""
    use_bias: bool = False
    """Biases in the projections."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the heads divide the width and the dropout is a share."""
        check_heads(dim, self.num_heads, path)
        check_dropout(self.dropout, path)


class AttentionState(NamedTuple):
    """Keys and values of the tokens seen, per row."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    segments: Int[Array, "B N"]
    """Document of each stored pair, 0 where the slot is unused."""
    length: RowInts
    """Stored pairs of the row."""
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("mha", AttentionConfig)
class Attention(Mixer):
    """Causal multi-head softmax attention.

    y = W_o · concat_h softmax(q_h K_h^T / sqrt(K)) V_h over the tokens up to each query

    Reference: Vaswani et al. 2017, sec. 3.2; nanoGPT `CausalSelfAttention`.
    """

    config: AttentionConfig

    def __init__(self, config: AttentionConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, use_bias=config.use_bias, init=init.weight, rngs=rngs)
        self.out = Linear(dim, dim, use_bias=config.use_bias, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> AttentionState:
        """Return an empty cache for `max_len` tokens per row (required)."""
        size = cache.required_len(max_len, "mha")
        dtype = self.qkv.kernel.dtype if dtype is None else dtype
        heads = self.config.num_heads
        pairs = jnp.zeros((batch, size, heads, self.dim // heads), dtype)
        counts = jnp.zeros((batch,), jnp.int32)
        return AttentionState(pairs, pairs, jnp.zeros((batch, size), jnp.int32), counts, counts)

    def mix(
        self,
        x: Activations,
        state: AttentionState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Attend within the row, or over the cache if there is a state."""
        q, k, v = (
            split_heads(a, self.config.num_heads) for a in jnp.split(self.qkv(x), 3, axis=-1)
        )
        places = None
        if state is not None:
            ids = cache.continued(segment_ids, state.segment, x.shape[1])
            state, places = _store(state, k, v, ids)
            k, v = state.keys.astype(k.dtype), state.values.astype(v.dtype)
        read = attention(
            q,
            k,
            v,
            scale=1.0 / math.sqrt(q.shape[-1]),
            segment_ids=segment_ids if state is None else None,  # places hold documents too
            places=places,
            dropout=weight_dropout(self.config.dropout, rngs),
            implementation=implementation,
        )
        y = dropout(self.out(merge_heads(read)), self.config.dropout, rngs)
        if state is not None:
            y = poison_rows(cache.overrun(state.length, state.keys), y)
        return MixerOutput(y, state, {})


def _store(
    state: AttentionState, k: Array, v: Array, segment_ids: Array
) -> tuple[AttentionState, Places]:
    rows = spans(segment_ids, state.segment)
    segments = cache.append(state.segments, segment_ids, state.length, rows.valid)
    after = AttentionState(
        keys=cache.append(state.keys, k, state.length, rows.valid),
        values=cache.append(state.values, v, state.length, rows.valid),
        segments=segments,
        length=state.length + rows.rank[:, -1],
        segment=last_real(segment_ids, rows.valid, state.segment),
    )
    return after, cache.places_in_cache(segments, state.length, rows)
