"""Per-row append-only buffers, the storage of attention-like states."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped

from jaxmem.errors import ShapeError
from jaxmem.ops.attention import Places
from jaxmem.ops.segments import Spans
from jaxmem.shapes import Keys, RowInts, SegmentIds, Valid, Values


def append(
    buffer: Shaped[Array, "B N ..."], new: Shaped[Array, "B T ..."], start: RowInts, valid: Valid
) -> Shaped[Array, "B N ..."]:
    """Write each row's valid entries one after another, from slot `start` of that row on.

    Entries before slot 0 or beyond the buffer are dropped, as are invalid ones; nothing stored is
    ever overwritten by clamping, which `lax.dynamic_update_slice` would do.
    """
    size = buffer.shape[1]
    slot = start[:, None] + jnp.cumsum(valid, axis=1) - 1
    slot = jnp.where(valid & (slot >= 0), slot, size)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slot].set(new.astype(buffer.dtype), mode="drop")


def overrun(length: RowInts, buffer: Shaped[Array, "B N ..."]) -> Bool[Array, "B"]:
    """Return which rows hold more tokens than the buffer has slots."""
    return length > buffer.shape[1]


def required_len(max_len: int | None, mixer: str) -> int:
    """Return `max_len`, or raise ShapeError if a mixer with a cache was given none."""
    if max_len is None or max_len < 1:
        raise ShapeError(
            f"init_state of {mixer} needs max_len, the tokens per row that its cache must hold; "
            f"found {max_len}. Pass max_len=prompt length + tokens to generate."
        )
    return max_len


def check_len(max_len: int | None, mixer: str) -> None:
    """Raise ShapeError if a mixer whose state has a fixed size was given a length below 1."""
    if max_len is not None:
        required_len(max_len, mixer)


def continued(segment_ids: SegmentIds | None, segment: RowInts, length: int) -> SegmentIds:
    """Return segment ids, or the state's own document (1 before any) for every token."""
    if segment_ids is not None:
        return segment_ids
    return jnp.broadcast_to(jnp.maximum(segment, 1)[:, None], (segment.shape[0], length))


def places_in_cache(segments: Int[Array, "B N"], length: RowInts, rows: Spans) -> Places:
    """Return places for tokens that attend to a cache into which they have been appended.

    Args:
      segments: document of each slot, with those of the tokens.
      length: entries of each row before them.
      rows: the tokens.
    """
    return Places(
        query=length[:, None] + rows.rank - 1,
        key=jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape),
        query_segment=rows.segment,
        key_segment=segments,
    )


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens seen, per row."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H V"]
    log_decay: Float[Array, "B N H"] | None
    """Decay that each token lets the weights of earlier ones pass with; None: none."""
    segments: Int[Array, "B N"]
    """Document of each slot, 0 where it is unused."""
    length: RowInts
    """Slots in use."""


def init_cache(
    batch: int,
    size: int,
    heads: int,
    width: int,
    dtype: DTypeLike,
    *,
    value_width: int | None = None,
    log_decay: bool = False,
) -> KeyValueCache:
    """Return an empty cache of `size` tokens per row; decays are float32 or wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return KeyValueCache(
        keys=jnp.zeros((batch, size, heads, width), dtype),
        values=jnp.zeros((batch, size, heads, value_width or width), dtype),
        log_decay=jnp.zeros((batch, size, heads), wide) if log_decay else None,
        segments=jnp.zeros((batch, size), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def stored(
    cache: KeyValueCache,
    keys: Keys,
    values: Values,
    segment_ids: SegmentIds,
    rows: Spans,
    log_decay: Float[Array, "B T H"] | None = None,
) -> tuple[KeyValueCache, Places]:
    """Append tokens to a cache, and say where they and all others stand."""
    start, valid = cache.length, rows.valid
    decays = cache.log_decay
    if decays is not None:
        assert log_decay is not None, "a cache of decays is given one for each token"
        decays = append(decays, log_decay, start, valid)
    segments = append(cache.segments, segment_ids, start, valid)
    after = KeyValueCache(
        keys=append(cache.keys, keys, start, valid),
        values=append(cache.values, values, start, valid),
        log_decay=decays,
        segments=segments,
        length=start + rows.rank[:, -1],
    )
    return after, places_in_cache(segments, start, rows)
