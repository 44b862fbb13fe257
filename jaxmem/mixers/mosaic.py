"""Memory Mosaics: the contextual memory and the persistent memory, of nanoMosaics and the Library.

An associative memory stores pairs of a key and a value and reads by kernel regression: a softmax,
over keys of unit length, that weighs the values. The key summarises the recent past by a leaky
average; the query is the same vector; the value looks a token ahead, so the memory predicts. The
persistent memory reads trained pairs instead and stands in the place of a feed-forward layer.

The releases differ in the limit of the scale, and the Library has further extractors; its two
variants (`regular` and `eft`) compute the same keys, for they scale leaky averages by different
positive numbers, which the unit length takes out again.

Reference: Zhang et al. 2024, "Memory Mosaics" (arXiv 2405.06394); nanoMosaics `MemoryMosaic`,
  Library `StackAssoMem`.
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
from jaxmem.nn.features import (
    VALUE_SCALE_START,
    Extractor,
    KeyExtractor,
    KeyState,
    ValueExtractor,
    check_extractor,
)
from jaxmem.nn.heads import check_heads, merge_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, check_dropout, dropout, weight_dropout
from jaxmem.nn.window import History
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.persistent_read import persistent_read
from jaxmem.ops.segments import last_real, poison_rows, spans
from jaxmem.shapes import Activations, Queries, RowInts, SegmentIds

NANO_LIMIT = math.log(65535)
"""nanoMosaics' limit of the log of a key's or a query's scale: its exponential fits float16."""
LIBRARY_LIMIT = 10.0
"""The Library's limit of the log of the logits' factor: it clamps that of one key at 5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(MixerConfig):
    """What both memories have."""

    paper: ClassVar[str] = "Memory Mosaics (arXiv 2405.06394)"
    parity: ClassVar[str] = "golden: nanoMosaics and Library, outputs and gradients"

    num_heads: int = 4
    """Memory units; must divide the model width."""
    key_extractor: Extractor = "conv"
    """What keys average: conv, a projection of the last tokens, or mix, which equals one token."""
    key_kernel_size: int = 1
    """Tokens that a key's convolution spans."""
    scale_limit: float = NANO_LIMIT
    """Largest log of the factor of the logits; 10 in the Library."""
    dropout: float = 0.0
    """Dropout of the output, and of the read weights if these have none of their own."""
    weight_dropout: float | None = None
    """Dropout of the read weights; None: the same as of the output."""
    use_bias: bool = False
    """Biases in the projections."""

    @property
    def read_dropout(self) -> float:
        """Dropout of the read weights."""
        return self.dropout if self.weight_dropout is None else self.weight_dropout

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless heads, kernel, scale and dropouts make sense at this width."""
        check_heads(dim, self.num_heads, path)
        check_extractor(self.key_extractor, self.key_kernel_size, f"{path}.key")
        if not self.scale_limit > 0.0:  # so that NaN is refused
            raise ConfigError(f"{path}.scale_limit={self.scale_limit} is not positive. Use 10.")
        check_dropout(self.dropout, path)
        check_dropout(self.read_dropout, path, field="weight_dropout")


def key_extractor(config: MemoryConfig, dim: int, *, init: Init, rngs: nnx.Rngs) -> KeyExtractor:
    """Build the extractor of a memory's keys."""
    return KeyExtractor(
        dim,
        config.num_heads,
        config.key_extractor,
        kernel_size=config.key_kernel_size,
        scale_limit=config.scale_limit,
        use_bias=config.use_bias,
        init=init,
        rngs=rngs,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextualMemoryConfig(MemoryConfig):
    """Memory of the tokens of this context, one unit per head."""

    scale_limit: float = 2 * NANO_LIMIT
    """Largest log of the factor of the logits; 10 in the Library."""
    value_extractor: Extractor = "mix"
    """What values are: mix, of a projected token and a later one, or conv, a convolution."""
    value_kernel_size: int = 2
    """Tokens that a value's convolution spans; mix spans the two that it mixes."""
    lag: int = 1
    """How many tokens a value looks ahead, and so how old a pair must be to be read."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the fields make sense at this width."""
        super().check(dim, path)
        check_extractor(self.value_extractor, self.value_kernel_size, f"{path}.value")
        if self.lag < 1:
            raise ConfigError(
                f"{path}.lag={self.lag}. Use 1 or more; a token cannot read its own pair."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersistentMemoryConfig(MemoryConfig):
    """Memory of trained pairs, one table per head and bank."""

    memory_size: int = 448
    """Stored pairs per head and bank; 3.5 times the width has the budget of a GPT-2 layer."""
    num_banks: int = 1
    """Tables whose reads are averaged."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the fields make sense at this width."""
        super().check(dim, path)
        for field in ("memory_size", "num_banks"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{path}.{field}={getattr(self, field)}. Use 1 or more.")


class ContextualState(NamedTuple):
    """Pairs stored so far, per row; the newest values wait for the tokens that they look at."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H K"]
    segments: Int[Array, "B N"]
    """Document of each stored pair, 0 where the slot is unused."""
    history: History
    """What the values to come need of the tokens before."""
    key: KeyState
    length: RowInts
    """Tokens seen by the row; the values of the last `lag` of them are not stored yet."""
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("contextual_memory", ContextualMemoryConfig)
class ContextualMemory(Mixer):
    """Memory of the tokens of this context: stores pairs, reads them by kernel regression.

    y_t = W_o Σ_{i≤t-lag} softmax_i(e^{2 s} k_t·k_i) v_i, with unit keys k and look-ahead values v

    v_i depends on x up to i + lag, yet only i ≤ t - lag is read, so y_t depends on x up to t. The
    first `lag` tokens of a document read nothing and give 0 (plus the bias).

    Reference: Memory Mosaics, sec. 4; nanoMosaics `ContextMem`; Library `InContextAssoMemBlock`.
      Differs: vectors of length 0, which give NaN there, are read as 0.
    """

    config: ContextualMemoryConfig

    def __init__(self, config: ContextualMemoryConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        self.key = key_extractor(config, dim, init=init, rngs=rngs)
        self.value = ValueExtractor(
            dim,
            config.num_heads,
            config.value_extractor,
            kernel_size=config.value_kernel_size,
            shift=config.lag,
            use_bias=config.use_bias,
            init=init,
            rngs=rngs,
        )
        self.out = Linear(dim, dim, use_bias=config.use_bias, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> ContextualState:
        """Return an empty memory for `max_len` tokens per row (required)."""
        size = cache.required_len(max_len, "contextual_memory")
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        heads = self.config.num_heads
        shape = (batch, size, heads, self.dim // heads)
        counts = jnp.zeros((batch,), jnp.int32)
        return ContextualState(
            keys=jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
            values=jnp.zeros(shape, dtype),
            segments=jnp.zeros((batch, size), jnp.int32),
            history=self.value.init_history(batch, dtype),
            key=self.key.init_state(batch, dtype),
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
        keys, key_state = self.key(
            x,
            None if state is None else state.key,
            segment_ids=segment_ids,
            initial_segment=None if state is None else state.segment,
            implementation=implementation,
        )
        if state is None:
            stored_keys, values, places = keys, self.value(x, segment_ids), None
        else:
            completed, history = self.value.completed(
                x, state.history, segment_ids=segment_ids, initial_segment=state.segment
            )
            state = state._replace(key=key_state, history=history)
            ids = cache.continued(segment_ids, state.segment, x.shape[1])
            state, places = self._store(state, keys, self.value.scaled(completed), ids)
            stored_keys, values = state.keys.astype(keys.dtype), state.values.astype(x.dtype)
        read = attention(
            keys,
            stored_keys,
            values,
            scale=self.key.logit_scale(),
            lag=self.config.lag,
            segment_ids=segment_ids if state is None else None,  # places hold documents too
            places=places,
            dropout=weight_dropout(self.config.read_dropout, rngs),
            implementation=implementation,
        )
        y = dropout(self.out(merge_heads(read)), self.config.dropout, rngs)
        if state is not None:
            y = poison_rows(cache.overrun(state.length, state.keys), y)
        return MixerOutput(y, state, {})

    def _store(
        self, state: ContextualState, keys: Queries, values: Queries, ids: Array
    ) -> tuple[ContextualState, Places]:
        """Append the keys of these tokens, and the values that they complete.

        Values stand `lag` slots behind keys. One that the next document completes is never read.
        """
        rows = spans(ids, state.segment)
        first_value = state.length - self.config.lag
        segments = cache.append(state.segments, ids, state.length, rows.valid)
        after = state._replace(
            keys=cache.append(state.keys, keys, state.length, rows.valid),
            values=cache.append(state.values, values, first_value, rows.valid),
            segments=segments,
            length=state.length + rows.rank[:, -1],
            segment=last_real(ids, rows.valid, state.segment),
        )
        return after, cache.places_in_cache(segments, state.length, rows)


class PersistentState(NamedTuple):
    """What keys need of the tokens before; the stored pairs are parameters."""

    key: KeyState
    segment: RowInts
    """Document of the row's last token, 0 before any."""


@register("persistent_memory", PersistentMemoryConfig)
class PersistentMemory(Mixer):
    """Memory of trained pairs, read like a context; stands in the place of a feed-forward layer.

    y_t = W_o e^{10 s} (1/R) Σ_r Σ_p softmax_p(e^{2 s_k} k_t·K_{r,p}) V_{r,p}

    Stored keys carry no scale of their own, hence the squared scale on the query side.

    Reference: Memory Mosaics, sec. 5; nanoMosaics `PersistentMem`; Library
      `PersistentAssoMemBlock`.
    """

    config: PersistentMemoryConfig

    def __init__(self, config: PersistentMemoryConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        heads = config.num_heads
        width = dim // heads
        shape = (config.num_banks, heads, config.memory_size, width)
        table = nnx.initializers.normal(1.0 / math.sqrt(width))
        self.key = key_extractor(config, dim, init=init, rngs=rngs)
        self.keys = nnx.Param(table(rngs.params(), shape, jnp.float32))
        self.values = nnx.Param(table(rngs.params(), shape, jnp.float32))
        self.scale = nnx.Param(jnp.full((heads,), VALUE_SCALE_START))
        self.out = Linear(dim, dim, use_bias=config.use_bias, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> PersistentState:
        """Return the state before any token; its size does not depend on `max_len`."""
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        return PersistentState(self.key.init_state(batch, dtype), jnp.zeros((batch,), jnp.int32))

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
        queries, key_state = self.key(
            x,
            None if state is None else state.key,
            segment_ids=segment_ids,
            initial_segment=None if state is None else state.segment,
            implementation=implementation,
        )
        read = persistent_read(
            queries,
            self.keys[...],
            self.values[...].astype(x.dtype),
            scale=self.key.logit_scale(),
            dropout=weight_dropout(self.config.read_dropout, rngs),
            implementation=implementation,
        )
        read = read * jnp.exp(10.0 * self.scale[...])[:, None].astype(read.dtype)
        y = dropout(self.out(merge_heads(read)), self.config.dropout, rngs)
        if state is not None:
            ids = cache.continued(segment_ids, state.segment, x.shape[1])
            state = PersistentState(key_state, last_real(ids, ids != 0, state.segment))
        return MixerOutput(y, state, {})
