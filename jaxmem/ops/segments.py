"""Bookkeeping for packed rows: which tokens are real, where a document starts, what comes next.

A row may hold several documents, told apart by `segment_ids`; id 0 is padding and may stand before,
between or after real tokens. All functions treat a padded token as if it were not there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from jaxmem.shapes import RowInts, SegmentIds, Valid


class Spans(NamedTuple):
    """Rows of real tokens, with everything counted from the state that came before them."""

    valid: Valid
    """Real tokens."""
    segment: SegmentIds
    """Document of each token, padding taking the document of the last real token before it."""
    reset: Valid
    """Real tokens that start another document than the token (or state) before them."""
    rank: Int[Array, "B T"]
    """Real tokens of the row up to and including this one."""


def spans(segment_ids: SegmentIds, initial: RowInts | None = None) -> Spans:
    """Describe packed rows.

    Args:
      segment_ids: document of each token, 0 for padding.
      initial: document that each row's state belongs to; 0 where there is no history. None means
        that the state, if any, belongs to each row's first document.
    """
    valid = segment_ids != 0
    time = jnp.arange(segment_ids.shape[1])
    last = lax.cummax(jnp.where(valid, time, -1), axis=1)
    if initial is None:
        first = jnp.argmax(valid, axis=1)
        initial = jnp.take_along_axis(segment_ids, first[:, None], axis=1)[:, 0]
    carried = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    segment = jnp.where(last >= 0, carried, initial[:, None])
    before = jnp.concatenate([initial[:, None], segment[:, :-1]], axis=1)
    return Spans(valid, segment, segment != before, jnp.cumsum(valid, axis=1, dtype=jnp.int32))


def next_real(valid: Valid) -> Int[Array, "B T"]:
    """Return for each token the index of the next real token after it, T where there is none."""
    length = valid.shape[1]
    index = jnp.where(valid, jnp.arange(length), length)
    at_or_after = lax.cummin(index, axis=1, reverse=True)
    none = jnp.full_like(index[:, :1], length)
    return jnp.concatenate([at_or_after[:, 1:], none], axis=1)


def last_real(values: Shaped[Array, "B T ..."], valid: Valid, otherwise: Array) -> Array:
    """Return each row's value at its last real token, or `otherwise` (B, ...) where it has none."""
    length = valid.shape[1]
    index = jnp.max(jnp.where(valid, jnp.arange(length), -1), axis=1)
    wide = (-1,) + (1,) * (values.ndim - 1)
    picked = jnp.take_along_axis(values, jnp.maximum(index, 0).reshape(wide), axis=1)[:, 0]
    return jnp.where((index >= 0).reshape(wide[:-1]), picked, otherwise)


def positions_in_segment(rows: Spans, start: RowInts | None = None) -> Int[Array, "B T"]:
    """Count real tokens within each document from 0; `start` continues the state's document.

    Padding gets the position that the next real token of its document would get.
    """
    before = rows.rank - rows.valid
    at_reset = lax.cummax(jnp.where(rows.reset, before, -1), axis=1)
    offset = jnp.zeros_like(at_reset[:, 0]) if start is None else start
    return jnp.where(at_reset >= 0, before - at_reset, before + offset[:, None])


def poison_rows(condition: Bool[Array, "B"], values: Array) -> Array:
    """Turn the rows of `values` for which `condition` holds into NaN (an overrun inside jit)."""
    wide = condition.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.where(wide, jnp.nan, values)
