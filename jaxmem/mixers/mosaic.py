"""Memory Mosaics: the contextual memory and the persistent memory of nanoMosaics.

An associative memory stores pairs of a key and a value and reads by kernel regression: a softmax,
over keys of unit length, that weighs the values. The key summarises the recent past by a leaky
average; the query is the same vector; the value looks one token ahead, so the memory predicts. The
persistent memory reads trained pairs instead and stands in the place of a feed-forward layer.

Reference: Zhang et al. 2024, "Memory Mosaics" (arXiv 2405.06394); nanoMosaics `MemoryMosaic`.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn import cache
from jaxmem.nn.heads import check_heads, merge_heads, split_heads
from jaxmem.nn.init import Init, decay_ladder, uniform_per_head
from jaxmem.nn.layers import Linear, check_dropout, dropout, weight_dropout
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.leaky_average import LeakyState, decay_rate, init_leaky_state, leaky_average
from jaxmem.ops.norms import at_least_float32, clamped_exp, l2_normalise
from jaxmem.ops.persistent_read import persistent_read
from jaxmem.ops.segments import last_real, next_real, poison_rows, spans
from jaxmem.shapes import Activations, HeadScalars, Queries, RowInts, SegmentIds

KEY_SCALE_LIMIT = math.log(65535)
"""Largest log of a key scale: its exponential still fits float16."""
KEY_SCALE_START = 0.1
VALUE_SCALE_START = -0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextualMemoryConfig(MixerConfig):
    """Memory of the tokens of this context, one unit per head."""

    paper: ClassVar[str] = "Memory Mosaics (arXiv 2405.06394)"
    parity: ClassVar[str] = "golden: nanoMosaics, outputs and gradients"

    num_heads: int = 4
    """Memory units; must divide the model width."""
    dropout: float = 0.0
    """Dropout of the read weights and of the output."""
    use_bias: bool = False
    """Biases in the projections."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the heads divide the width and the dropout is a share."""
        check_heads(dim, self.num_heads, path)
        check_dropout(self.dropout, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersistentMemoryConfig(MixerConfig):
    """Memory of trained pairs, one table per head and bank."""

    paper: ClassVar[str] = "Memory Mosaics (arXiv 2405.06394)"
    parity: ClassVar[str] = "golden: nanoMosaics, outputs and gradients"

    num_heads: int = 4
    """Memory units; must divide the model width."""
    memory_size: int = 448
    """Stored pairs per head and bank; 3.5 times the width has the budget of a GPT-2 layer."""
    num_banks: int = 1
    """Tables whose reads are averaged."""
    dropout: float = 0.0
    """Dropout of the read weights and of the output."""
    use_bias: bool = False
    """Biases in the projections."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless heads, tables and dropout make sense at this width."""
        check_heads(dim, self.num_heads, path)
        check_dropout(self.dropout, path)
        for field in ("memory_size", "num_banks"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{path}.{field}={getattr(self, field)}. Use 1 or more.")


class KeyExtractor(nnx.Module):
    """k_t = unit(Σ_{i≤t} λ^{t-i} W_k x_i) per head, with a learnt scale kept apart.

    Keys are float32 or wider whatever the dtype of x: the logits multiply a difference of keys by
    the squared scale, up to e^22, and with it the rounding of the keys.

    Reference: nanoMosaics `KeyFeatureExtractor`.
    """

    def __init__(self, dim: int, num_heads: int, *, use_bias: bool, init: Init, rngs: nnx.Rngs):
        self.projection = Linear(dim, dim, use_bias=use_bias, init=init.weight, rngs=rngs)
        self.decay = nnx.Param(decay_ladder(num_heads))
        self.scale = nnx.Param(jnp.full((num_heads,), KEY_SCALE_START))

    def __call__(
        self,
        x: Activations,
        state: LeakyState | None,
        *,
        segment_ids: SegmentIds | None = None,
        initial_segment: RowInts | None = None,
        implementation: Implementation = "auto",
    ) -> tuple[Queries, LeakyState]:
        """Return unit keys and the leaky sums after the last token."""
        rate = decay_rate(self.decay[...])
        averaged, state = leaky_average(
            at_least_float32(split_heads(self.projection(x), rate.shape[0])),
            rate,
            initial_state=state,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
            implementation=implementation,
        )
        return l2_normalise(averaged), state

    def key_scale(self, power: int) -> HeadScalars:
        """Return exp(min(power · 10 · scale, ln 65535)), the length of the keys."""
        return clamped_exp(self.scale[...], power, KEY_SCALE_LIMIT)


class ValueExtractor(nnx.Module):
    """v_t = exp(10 s) · unit(c u_t + (1 - c) u_{t+1}) per head, with u = W_v x.

    Reference: nanoMosaics `ValFeatureExtractor`.
    """

    def __init__(self, dim: int, num_heads: int, *, use_bias: bool, init: Init, rngs: nnx.Rngs):
        self.projection = Linear(dim, dim, use_bias=use_bias, init=init.weight, rngs=rngs)
        self.mix = nnx.Param(uniform_per_head(rngs.params(), num_heads))
        self.scale = nnx.Param(jnp.full((num_heads,), VALUE_SCALE_START))

    def __call__(self, u: Activations, segment_ids: SegmentIds | None = None) -> Queries:
        """Return the values of a row of projections; the last one looks ahead at zeros."""
        return self.combine(u, _successors(u, segment_ids))

    def combine(self, u: Activations, u_next: Activations) -> Queries:
        """Mix the projection of a token with that of its successor and scale."""
        heads = self.mix.shape[0]
        mix = self.mix[...].astype(u.dtype)[:, None]
        mixed = mix * split_heads(u, heads) + (1 - mix) * split_heads(u_next, heads)
        return l2_normalise(mixed) * jnp.exp(10.0 * self.scale[...])[:, None].astype(u.dtype)


class ContextualState(NamedTuple):
    """Pairs stored so far, per row; the newest value waits for its successor."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    segments: Int[Array, "B N"]
    """Document of each stored pair, 0 where the slot is unused."""
    pending: Float[Array, "B D"]
    """Value projection of the last token, whose value is completed by the next token."""
    sums: LeakyState
    length: RowInts
    """Tokens seen by the row; the value of the last one is not stored yet."""
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("contextual_memory", ContextualMemoryConfig)
class ContextualMemory(Mixer):
    """Memory of the tokens of this context: stores pairs, reads them by kernel regression.

    y_t = W_o Σ_{i<t} softmax_i(s² k_t·k_i) v_i, with unit keys k and look-ahead values v

    v_i depends on x_{i+1}, yet only i < t is read, so y_t depends on x up to t. The first token of
    a document reads nothing and gives 0 (plus the bias).

    Reference: Memory Mosaics, sec. 4; nanoMosaics `ContextMem`.
    """

    config: ContextualMemoryConfig

    def __init__(self, config: ContextualMemoryConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        heads, bias = config.num_heads, config.use_bias
        self.key = KeyExtractor(dim, heads, use_bias=bias, init=init, rngs=rngs)
        self.value = ValueExtractor(dim, heads, use_bias=bias, init=init, rngs=rngs)
        self.out = Linear(dim, dim, use_bias=bias, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> ContextualState:
        """Return an empty memory for `max_len` tokens per row (required)."""
        size = cache.required_len(max_len, "contextual_memory")
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        heads = self.config.num_heads
        width = self.dim // heads
        shape = (batch, size, heads, width)
        wide = jnp.promote_types(dtype, jnp.float32)
        counts = jnp.zeros((batch,), jnp.int32)
        return ContextualState(
            keys=jnp.zeros(shape, wide),
            values=jnp.zeros(shape, dtype),
            segments=jnp.zeros((batch, size), jnp.int32),
            pending=jnp.zeros((batch, self.dim), dtype),
            sums=init_leaky_state(batch, heads, width, dtype=wide),
            length=counts,
            segment=counts,
        )

    def mix(
        self,
        x: Activations,
        state: ContextualState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Read the pairs of the row, or those of the memory if there is a state."""
        keys, sums = self.key(
            x,
            None if state is None else state.sums,
            segment_ids=segment_ids,
            initial_segment=None if state is None else state.segment,
            implementation=implementation,
        )
        u = self.value.projection(x)
        if state is None:
            stored_keys, values = keys, self.value(u, segment_ids)
            places = None if segment_ids is None else cache.places_in_row(segment_ids)
        else:
            ids = cache.continued(segment_ids, state.segment, x.shape[1])
            state, places = self._store(state, keys, u, sums, ids)
            stored_keys, values = state.keys.astype(keys.dtype), state.values.astype(x.dtype)
        read = attention(
            keys,
            stored_keys,
            values,
            scale=self.key.key_scale(1) ** 2,
            lag=1,
            places=places,
            dropout=weight_dropout(self.config.dropout, rngs),
            implementation=implementation,
        )
        y = dropout(self.out(merge_heads(read)), self.config.dropout, rngs)
        if state is not None:
            y = poison_rows(cache.overrun(state.length, state.keys), y)
        return MixerOutput(y, state, {})

    def _store(
        self, state: ContextualState, keys: Queries, u: Activations, sums: LeakyState, ids: Array
    ) -> tuple[ContextualState, Places]:
        """Append the keys of these tokens, and the values that they complete.

        The value of the last token seen before is completed by the first token here, so values
        lag one slot behind keys. A value that the next document completes is never read.
        """
        rows = spans(ids, state.segment)
        waiting = jnp.concatenate([state.pending[:, None].astype(u.dtype), u], axis=1)
        before = jnp.ones_like(rows.valid[:, :1])
        succeeded = jnp.concatenate([before, rows.valid], axis=1)
        successor = next_real(succeeded)
        u_next = jnp.take_along_axis(
            waiting, jnp.minimum(successor, waiting.shape[1] - 1)[..., None], axis=1
        )
        complete = succeeded & (successor < waiting.shape[1])
        segments = cache.append(state.segments, ids, state.length, rows.valid)
        after = ContextualState(
            keys=cache.append(state.keys, keys, state.length, rows.valid),
            values=cache.append(
                state.values, self.value.combine(waiting, u_next), state.length - 1, complete
            ),
            segments=segments,
            pending=last_real(u, rows.valid, state.pending.astype(u.dtype)).astype(
                state.pending.dtype
            ),
            sums=sums,
            length=state.length + rows.rank[:, -1],
            segment=last_real(ids, rows.valid, state.segment),
        )
        return after, cache.places_in_cache(segments, state.length, rows)


def _successors(u: Activations, segment_ids: SegmentIds | None) -> Activations:
    """Return the projection of each token's successor in the row, 0 where there is none."""
    if segment_ids is None:
        return jnp.pad(u[:, 1:], ((0, 0), (0, 1), (0, 0)))
    index = next_real(segment_ids != 0)
    picked = jnp.take_along_axis(u, jnp.minimum(index, u.shape[1] - 1)[..., None], axis=1)
    return jnp.where((index < u.shape[1])[..., None], picked, 0)


class PersistentState(NamedTuple):
    """The leaky sums of the key; the stored pairs are parameters."""

    sums: LeakyState
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("persistent_memory", PersistentMemoryConfig)
class PersistentMemory(Mixer):
    """Memory of trained pairs, read like a context; stands in the place of a feed-forward layer.

    y_t = W_o e^{10 s} (1/R) Σ_r Σ_p softmax_p(s_k k_t·K_{r,p}) V_{r,p}

    Stored keys carry no scale of their own, hence the squared scale on the query side (the clamp
    applies after squaring, as upstream).

    Reference: Memory Mosaics, sec. 5; nanoMosaics `PersistentMem`.
    """

    config: PersistentMemoryConfig

    def __init__(self, config: PersistentMemoryConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        heads, bias = config.num_heads, config.use_bias
        width = dim // heads
        shape = (config.num_banks, heads, config.memory_size, width)
        table = nnx.initializers.normal(1.0 / math.sqrt(width))
        self.key = KeyExtractor(dim, heads, use_bias=bias, init=init, rngs=rngs)
        self.keys = nnx.Param(table(rngs.params(), shape, jnp.float32))
        self.values = nnx.Param(table(rngs.params(), shape, jnp.float32))
        self.scale = nnx.Param(jnp.full((heads,), VALUE_SCALE_START))
        self.out = Linear(dim, dim, use_bias=bias, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> PersistentState:
        """Return the sums before any token; their size does not depend on `max_len`."""
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        heads = self.config.num_heads
        sums = init_leaky_state(
            batch, heads, self.dim // heads, dtype=jnp.promote_types(dtype, jnp.float32)
        )
        return PersistentState(sums, jnp.zeros((batch,), jnp.int32))

    def mix(
        self,
        x: Activations,
        state: PersistentState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Read the trained pairs for every token."""
        queries, sums = self.key(
            x,
            None if state is None else state.sums,
            segment_ids=segment_ids,
            initial_segment=None if state is None else state.segment,
            implementation=implementation,
        )
        read = persistent_read(
            queries,
            self.keys[...],
            self.values[...].astype(x.dtype),
            scale=self.key.key_scale(2),
            dropout=weight_dropout(self.config.dropout, rngs),
            implementation=implementation,
        )
        read = read * jnp.exp(10.0 * self.scale[...])[:, None].astype(read.dtype)
        y = dropout(self.out(merge_heads(read)), self.config.dropout, rngs)
        if state is not None:
            ids = cache.continued(segment_ids, state.segment, x.shape[1])
            state = PersistentState(sums, last_real(ids, ids != 0, state.segment))
        return MixerOutput(y, state, {})
