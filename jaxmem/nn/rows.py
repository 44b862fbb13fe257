"""Where the tokens of a call stand: documents, counts and positions, continued from a state."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jaxmem.nn import cache
from jaxmem.ops.attention import Places
from jaxmem.ops.rope import PositionDType, RopeLayout, rope
from jaxmem.ops.segments import Spans, last_real, positions_in_segment, spans
from jaxmem.shapes import Queries, RowInts, SegmentIds


class Last(NamedTuple):
    """Where each row's last token stands; part of a state."""

    place: RowInts
    """Tokens of its document up to itself."""
    segment: RowInts
    """Its document, 0 before any."""


class Row(NamedTuple):
    """Where the tokens of a call stand."""

    ids: SegmentIds | None
    """Document of each token; None: rows of one document each, and no state."""
    before: RowInts | None
    """Document of the state; None: no state."""
    spans: Spans | None
    """What `jaxmem.ops.segments.spans` says of the documents; None like them."""
    count: Int[Array, "#B T"]
    """Tokens of each token's document up to itself; 1 where there are none, in padding."""
    positions: Int[Array, "#B T"]


def init_last(batch: int) -> Last:
    """Return the place before any token."""
    return Last(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32))


def row_of(
    length: int, segment_ids: SegmentIds | None, positions: SegmentIds | None, last: Last | None
) -> Row:
    """Describe the tokens of a call from its arguments and the state, if any."""
    if last is None and segment_ids is None:
        index = jnp.arange(length)[None]
        return Row(None, None, None, index + 1, index if positions is None else positions)
    before = None if last is None else last.segment
    ids = segment_ids if before is None else cache.continued(segment_ids, before, length)
    assert ids is not None
    rows = spans(ids, before)
    place = positions_in_segment(rows, None if last is None else last.place)
    # Before the first real token of a row padding sees nothing; 1 keeps logarithms finite.
    count = jnp.maximum(place + rows.valid, 1)
    return Row(ids, before, rows, count, place if positions is None else positions)


def documents(row: Row) -> tuple[SegmentIds, Spans]:
    """Return the documents of tokens that continue a state, where they are always told."""
    assert row.ids is not None
    assert row.spans is not None
    return row.ids, row.spans


def after(row: Row, last: Last) -> Last:
    """Return where the last token of a call stands."""
    ids, rows = documents(row)
    place = last_real(row.count, rows.valid, last.place)
    return Last(place, last_real(ids, rows.valid, last.segment))


def turned(
    x: Queries,
    row: Row,
    layout: RopeLayout,
    *,
    theta: float = 10000.0,
    position_dtype: PositionDType = "float32",
) -> Queries:
    """Turn queries or keys by their positions; angles are computed once if all rows share them."""
    alike = row.positions.shape[0] == 1
    positions = row.positions[0] if alike else row.positions
    return rope(x, positions, layout=layout, theta=theta, position_dtype=position_dtype)


def places_in_row(row: Row) -> Places | None:
    """Return places by index; padding is not seen, and sees what the token before it sees."""
    if row.ids is None or row.spans is None:
        return None
    index = jnp.broadcast_to(jnp.arange(row.ids.shape[1]), row.ids.shape)
    return Places(index, index, row.spans.segment, row.ids)
