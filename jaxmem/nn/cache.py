"""Per-row append-only buffers, the storage of attention-like states."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Shaped

from jaxmem.errors import ShapeError
from jaxmem.ops.attention import Places
from jaxmem.ops.segments import Spans
from jaxmem.shapes import RowInts, SegmentIds, Valid


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
