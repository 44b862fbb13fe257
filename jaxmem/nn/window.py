"""Each token's last few predecessors: the short memory of features that span several tokens.

A history is a row's last N vectors, the newest last. Before the start of a document stand zeros, so
that zeros are also the history of a row that has none.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxmem.nn import cache
from jaxmem.ops.segments import last_real, next_real, positions_in_segment, spans
from jaxmem.shapes import Activations, RowInts, SegmentIds, Valid

History = Float[Array, "B N D"]


def delays(
    x: Activations,
    history: History,
    segment_ids: SegmentIds | None,
    initial_segment: RowInts | None,
) -> tuple[list[Activations], History]:
    """Return x as it was N, ..., 1 and 0 tokens before, and the history after the last token.

    Only real tokens of the same document count; before its first there are zeros.

    Args:
      x: vectors of T tokens.
      history: the N tokens before them.
      segment_ids: document of each token, 0 for padding; None: all tokens continue the history.
      initial_segment: document that the history belongs to; None: each row's first document.
    """
    count, length = history.shape[1], x.shape[1]
    before = history.astype(x.dtype)
    if segment_ids is None:
        stream = jnp.concatenate([before, x], axis=1)
        delayed = [stream[:, n : n + length] for n in range(count + 1)]
        return delayed, stream[:, length:].astype(history.dtype)
    if count == 0:
        return [x], history
    rows = spans(segment_ids, initial_segment)
    full = jnp.full_like(rows.rank[:, 0], count)
    # Real tokens one after another behind the history: n tokens ago is then n slots back.
    stream = jnp.pad(before, ((0, 0), (0, length), (0, 0)))
    stream = cache.append(stream, x, full, rows.valid)
    slot = count + rows.rank - 1
    place = positions_in_segment(rows, full)
    delayed = [_back(stream, slot, place, n) for n in range(count, 0, -1)]
    next_slot = count + rows.rank[:, -1:]
    next_place = last_real(place + 1, rows.valid, full)[:, None]
    after = [_back(stream, next_slot, next_place, n) for n in range(count, 0, -1)]
    return [*delayed, x], jnp.concatenate(after, axis=1).astype(history.dtype)


def _back(stream: Array, slot: Array, place: Array, steps: int) -> Array:
    """Return what stands `steps` slots before each slot, 0 if that is before the document."""
    picked = jnp.take_along_axis(stream, jnp.maximum(slot - steps, 0)[..., None], axis=1)
    return jnp.where((place >= steps)[..., None], picked, 0)


def ahead(x: Shaped[Array, "B T ..."], steps: int, valid: Valid) -> Shaped[Array, "B T ..."]:
    """Return x as it will be `steps` real tokens later, 0 where the row ends before."""
    length = x.shape[1]
    following = jnp.pad(next_real(valid), ((0, 0), (0, 1)), constant_values=length)
    index = following[:, :-1]
    for _ in range(steps - 1):
        index = jnp.take_along_axis(following, index, axis=1)
    wide = (*index.shape, *(1,) * (x.ndim - 2))
    picked = jnp.take_along_axis(x, jnp.minimum(index, length - 1).reshape(wide), axis=1)
    return jnp.where((index < length).reshape(wide), picked, 0)
