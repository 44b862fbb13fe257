"""Memory Mosaics v2: a short-term and a long-term contextual memory side by side.

Both are associative memories as in Memory Mosaics: they store pairs of a unit key and a value that
looks one token ahead, and read by kernel regression with the key as query. New are keys whose
average is gated by the input, a bandwidth that narrows as pairs accumulate, and the split: the
short-term memory reads the last pairs, the long-term memory only older ones, and training varies
how old these must be, so that nothing is learnt about positions. The feed-forward layer that stands
for the persistent memory is `swiglu`.

Reference: Zhang and Bottou 2025, "Memory Mosaics at scale" (arXiv 2507.03285). The paper released
  no code; tests compare with its formulas.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, call_key, register
from jaxmem.nn import cache
from jaxmem.nn.gated_features import Bandwidth, GatedKey, LookAheadValue
from jaxmem.nn.heads import check_heads, merge_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear
from jaxmem.nn.window import History
from jaxmem.ops.attention import Places, attention, places_in_row
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.segments import last_real, poison_rows, positions_in_segment, spans
from jaxmem.ops.weighted_average import WeightedState, init_weighted_state
from jaxmem.shapes import Activations, Queries, RowInts, SegmentIds, Valid


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextualMemoryV2Config(MixerConfig):
    """Short-term and long-term memory of the tokens of this context, units of each per head."""

    paper: ClassVar[str] = "Memory Mosaics v2 (arXiv 2507.03285)"
    parity: ClassVar[str] = "the paper's formulas; it released no code"

    num_heads: int = 4
    """Memory units of each kind; must divide the model width."""
    window: int = 256
    """Newest pairs, which the short-term memory reads."""
    min_lag: int = 64
    """Age in tokens from which on the long-term memory reads a pair."""
    max_lag: int = 256
    """In training each step draws the age between min_lag and this; equal: nothing is drawn."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless heads, window and ages make sense."""
        check_heads(dim, self.num_heads, path)
        if not 1 <= self.min_lag <= self.max_lag:
            raise ConfigError(
                f"{path}: min_lag={self.min_lag}, max_lag={self.max_lag}. "
                "Use 1 <= min_lag <= max_lag; a token cannot read its own pair."
            )
        if self.window < self.max_lag - 1:
            raise ConfigError(
                f"{path}: window={self.window} ends before max_lag={self.max_lag}, so neither "
                f"memory would read the pairs between. Use a window of {self.max_lag - 1} or more."
            )


class Pairs(NamedTuple):
    """Slots of stored pairs, in the order of their tokens."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    """Each is stored one token later than its key, being complete only then."""
    segments: Int[Array, "B N"]
    """Document of each pair, 0 where the slot is unused."""

    def widened(self, slots: int) -> "Pairs":
        """Add free slots at the end."""
        more = slots - self.keys.shape[1]
        return jax.tree.map(
            lambda a: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2)), self
        )

    def append(self, new: "Pairs", start: RowInts, valid: Valid) -> "Pairs":
        """Write new keys from slot `start` on, and values, which tokens complete, one before."""
        return Pairs(
            cache.append(self.keys, new.keys, start, valid),
            cache.append(self.values, new.values, start - 1, valid),
            cache.append(self.segments, new.segments, start, valid),
        )

    def slots(self, first: RowInts, count: int) -> "Pairs":
        """Return `count` slots of each row from slot `first` on."""
        index = first[:, None] + jnp.arange(count)
        return jax.tree.map(
            lambda a: jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), 1),
            self,
        )


class View(NamedTuple):
    """What one memory offers to the queries of a call."""

    queries: Queries
    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    places: Places | None
    """None: the pairs are those of the queries, in rows of one document."""


class MemoryState(NamedTuple):
    """What one memory carries from token to token."""

    pairs: Pairs
    sums: WeightedState
    """The averages that keys are made of."""
    history: History
    """Value projection of the last token, whose value the next one completes."""


class Memory(nnx.Module):
    """One of the two memories: its keys, values, bandwidth and output projection."""

    def __init__(self, dim: int, num_heads: int, *, init: Init, rngs: nnx.Rngs):
        self.key = GatedKey(dim, num_heads, init=init, rngs=rngs)
        self.value = LookAheadValue(dim, num_heads, init=init, rngs=rngs)
        self.bandwidth = Bandwidth(num_heads)
        self.out = Linear(dim, dim, use_bias=False, init=init.residual, rngs=rngs)

    def init_state(self, batch: int, slots: int, dtype: DTypeLike) -> MemoryState:
        """Return an empty memory with a number of slots per row."""
        dim, heads = self.out.kernel.shape[0], self.key.num_heads
        wide = jnp.promote_types(dtype, jnp.float32)
        shape = (batch, slots, heads, dim // heads)
        pairs = Pairs(
            jnp.zeros(shape, wide), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32)
        )
        sums = init_weighted_state(batch, heads, dim // heads, dtype=wide)
        return MemoryState(pairs, sums, self.value.init_history(batch, dtype))

    def rows(
        self, x: Activations, segment_ids: SegmentIds | None, implementation: Implementation
    ) -> View:
        """View the pairs of the rows themselves; without ids each is one document."""
        keys, _ = self.key(x, None, segment_ids=segment_ids, implementation=implementation)
        values = self.value(x, segment_ids)
        places = None if segment_ids is None else places_in_row(segment_ids)
        return View(keys, keys, values, places)

    def extended(
        self,
        x: Activations,
        state: MemoryState,
        *,
        start: RowInts,
        slots: int,
        segment: RowInts,
        segment_ids: SegmentIds,
        implementation: Implementation,
    ) -> tuple[View, MemoryState]:
        """View the stored pairs and those of these tokens, written from slot `start` on.

        Args:
          x: tokens.
          state: the memory before them.
          start: first free slot of each row.
          slots: how many there shall be, at least as many as the state has.
          segment: document that the state belongs to.
          segment_ids: documents of the tokens.
          implementation: of the key's average.
        """
        options = {"segment_ids": segment_ids, "initial_segment": segment}
        keys, sums = self.key(x, state.sums, implementation=implementation, **options)
        features, history = self.value.completed(x, state.history, **options)
        rows = spans(segment_ids, segment)
        pairs = state.pairs.widened(slots).append(
            Pairs(keys, self.value.scaled(features), segment_ids), start, rows.valid
        )
        places = cache.places_in_cache(pairs.segments, start, rows)
        view = View(keys, pairs.keys.astype(keys.dtype), pairs.values.astype(x.dtype), places)
        return view, MemoryState(pairs, sums, history)

    def read(
        self,
        view: View,
        readable: Int[Array, "#B T"],
        *,
        lag: int | Int[Array, ""],
        window: int | None = None,
        implementation: Implementation = "auto",
    ) -> Activations:
        """Read pairs `lag` or more and fewer than `window` tokens old by kernel regression.

        Args:
          view: queries and pairs.
          readable: how many pairs that is for each query, for its bandwidth.
          lag: a traced one is as good as a number.
          window: None is no limit.
          implementation: of the attention.
        """
        queries, keys, values, places = view
        if not isinstance(lag, int):
            # The op wants a number; a query that stands further back sees the same pairs.
            if places is None:
                places = places_in_row(jnp.ones(queries.shape[:2], jnp.int32))
            places, lag = places._replace(query=places.query - lag), 0
        y = attention(
            queries * self.bandwidth(readable)[..., None].astype(queries.dtype),
            keys,
            values,
            scale=1.0,
            lag=lag,
            window=window,
            places=places,
            implementation=implementation,
        )
        return self.out(merge_heads(y))


class ContextualV2State(NamedTuple):
    """Both memories, per row."""

    short: MemoryState
    """As many pairs as the window, the newest last."""
    long: MemoryState
    """Pairs from the first one on."""
    length: RowInts
    """Tokens seen by the row."""
    position: RowInts
    """Tokens seen of the row's current document."""
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("contextual_memory_v2", ContextualMemoryV2Config)
class ContextualMemoryV2(Mixer):
    r"""Short-term and long-term memory of the tokens of this context.

    y_t = W_s Σ_{t-h≤i<t} softmax_i(β_t k_t·k_i) v_i + W_l Σ_{i≤t-m} softmax_i(β'_t k'_t·k'_i) v'_i

    with gated unit keys, look-ahead values and bandwidths of each memory's own; [W_s W_l] is the
    projection of the two outputs concatenated. β counts the pairs readable at t in t's document,
    min(t, h) and max(t - m + 1, 0). A memory with nothing to read gives 0.

    h is `window`: the paper's text says t-h+1 ≤ i and its figure t-h ≤ i; this is the figure's, h
    pairs. m is `min_lag` in evaluation. In training (with `rngs`) it is uniform over min_lag ...
    max_lag, one draw per call of the model: all layers, rows and chunks share it.

    Reference: arXiv 2507.03285, sec. 3 and appendix.
    """

    config: ContextualMemoryV2Config

    def __init__(self, config: ContextualMemoryV2Config, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        self.short = Memory(dim, config.num_heads, init=init, rngs=rngs)
        self.long = Memory(dim, config.num_heads, init=init, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> ContextualV2State:
        """Return empty memories for `max_len` tokens per row (required)."""
        size = cache.required_len(max_len, "contextual_memory_v2")
        dtype = jnp.dtype(self.short.out.kernel.dtype if dtype is None else dtype)
        counts = jnp.zeros((batch,), jnp.int32)
        return ContextualV2State(
            short=self.short.init_state(batch, min(size, self.config.window), dtype),
            long=self.long.init_state(batch, size, dtype),
            length=counts,
            position=counts,
            segment=counts,
        )

    def mix(
        self,
        x: Activations,
        state: ContextualV2State | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Read the pairs of the row, or those of the memories if there is a state."""
        if state is None:
            place = jnp.arange(x.shape[1])[None]
            if segment_ids is not None:
                place = positions_in_segment(spans(segment_ids))
            short, long = (m.rows(x, segment_ids, implementation) for m in (self.short, self.long))
        else:
            short, long, place, state = self._store(x, state, segment_ids, implementation)
        h, m = self.config.window, self._lag(rngs)
        recent, old = jnp.minimum(place, h), jnp.maximum(place - m + 1, 0)
        y = self.short.read(short, recent, lag=1, window=h + 1, implementation=implementation)
        y += self.long.read(long, old, lag=m, implementation=implementation)
        if state is not None:
            y = poison_rows(cache.overrun(state.length, state.long.pairs.keys), y)
        return MixerOutput(y, state, {})

    def _store(
        self,
        x: Activations,
        state: ContextualV2State,
        segment_ids: SegmentIds | None,
        implementation: Implementation,
    ) -> tuple[View, View, SegmentIds, ContextualV2State]:
        """Add the pairs of these tokens to both memories.

        Returns:
          what the short-term and the long-term memory offer, the place of each token in its
          document, and the state after the last token, in which the short-term memory has dropped
          all but the newest pairs.
        """
        ids = cache.continued(segment_ids, state.segment, x.shape[1])
        rows = spans(ids, state.segment)
        options = {"segment": state.segment, "segment_ids": ids, "implementation": implementation}
        kept, size = (s.pairs.keys.shape[1] for s in (state.short, state.long))
        full = jnp.full_like(state.length, kept)
        short, short_state = self.short.extended(
            x, state.short, start=full, slots=kept + x.shape[1], **options
        )
        newest = short_state.pairs.slots(rows.rank[:, -1], kept)
        long, long_state = self.long.extended(
            x, state.long, start=state.length, slots=size, **options
        )
        place = positions_in_segment(rows, state.position)
        after = ContextualV2State(
            short=short_state._replace(pairs=newest),
            long=long_state,
            length=state.length + rows.rank[:, -1],
            position=last_real(place + 1, rows.valid, state.position),
            segment=last_real(ids, rows.valid, state.segment),
        )
        return short, long, place, after

    def _lag(self, rngs: nnx.Rngs | None) -> int | Int[Array, ""]:
        """Return the age from which on the long-term memory reads a pair."""
        first, last = self.config.min_lag, self.config.max_lag
        if rngs is None or first == last:
            return first
        return jax.random.randint(call_key(rngs), (), first, last + 1)
