"""Packed rows of any layout against plain loops over tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.nn.cache import append
from jaxmem.ops.leaky_average import LeakyState, leaky_average
from jaxmem.ops.segments import last_real, next_real, poison_rows, positions_in_segment, spans
from tests.helpers.compare import FORWARD, assert_close

ROWS, LENGTH = 2, 9  # one shape, so that every function is compiled once
small = settings(max_examples=60, deadline=None)
rows_of_ids = st.lists(
    st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=LENGTH, max_size=LENGTH),
    min_size=ROWS,
    max_size=ROWS,
)
row_ints = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS)
maybe_row_ints = st.none() | row_ints


def compiled(function: Callable) -> Callable:
    """Compile once per kind of arguments, take lists and return arrays of NumPy."""
    run = jax.jit(function)

    def call(*args: Any) -> Any:
        given = (None if a is None else np.asarray(a) for a in args)
        return jax.tree.map(np.asarray, run(*given))

    return call


run_spans = compiled(spans)
run_next = compiled(lambda ids: next_real(ids != 0))
run_last = compiled(lambda values, ids, other: last_real(values, ids != 0, other))
run_positions = compiled(
    lambda ids, initial, start: positions_in_segment(spans(ids, initial), start)
)
run_append = compiled(append)


def document_before(ids: list[int], initial: int | None) -> int:
    """Return the document that a row's state belongs to."""
    if initial is not None:
        return initial
    return next((i for i in ids if i), 0)


@small
@given(rows_of_ids, maybe_row_ints)
def test_spans(ids: list[list[int]], initial: list[int] | None):
    out = run_spans(ids, initial)
    for row, names in enumerate(ids):
        document = document_before(names, initial and initial[row])
        rank = 0
        for t, name in enumerate(names):
            assert bool(out.valid[row, t]) == (name != 0)
            assert bool(out.reset[row, t]) == (name not in (0, document))
            document = name or document
            rank += name != 0
            assert int(out.segment[row, t]) == document
            assert int(out.rank[row, t]) == rank


@small
@given(rows_of_ids)
def test_next_real(ids: list[list[int]]):
    expected = [
        [next((j for j in range(t + 1, LENGTH) if names[j]), LENGTH) for t in range(LENGTH)]
        for names in ids
    ]
    np.testing.assert_array_equal(run_next(ids), expected)


@small
@given(rows_of_ids)
def test_last_real(ids: list[list[int]]):
    values = np.arange(ROWS * LENGTH * 2).reshape(ROWS, LENGTH, 2)
    other = -np.ones((ROWS, 2), int)
    out = run_last(values, ids, other)
    for row, names in enumerate(ids):
        real = [t for t in range(LENGTH) if names[t]]
        np.testing.assert_array_equal(out[row], values[row, real[-1]] if real else other[row])


@small
@given(rows_of_ids, maybe_row_ints, maybe_row_ints)
def test_positions_in_segment(
    ids: list[list[int]], initial: list[int] | None, start: list[int] | None
):
    out = run_positions(ids, initial, start)
    for row, names in enumerate(ids):
        document = document_before(names, initial and initial[row])
        place = start[row] if start else 0
        for t, name in enumerate(names):
            if name not in (0, document):
                document, place = name, 0
            assert int(out[row, t]) == place
            place += name != 0


@small
@given(rows_of_ids, st.lists(st.integers(-1, 6), min_size=ROWS, max_size=ROWS))
def test_append_never_overwrites_and_drops_what_does_not_fit(
    ids: list[list[int]], start: list[int]
):
    size = 7
    buffer = -np.ones((ROWS, size), int)
    new = np.arange(100, 100 + ROWS * LENGTH).reshape(ROWS, LENGTH)
    out = run_append(buffer, new, start, np.array(ids) != 0)
    for row, names in enumerate(ids):
        expected, slot = [-1] * size, start[row]
        for t, name in enumerate(names):
            if name:
                if 0 <= slot < size:
                    expected[slot] = int(new[row, t])
                slot += 1
        np.testing.assert_array_equal(out[row], expected)


@functools.cache
def packed_average(with_initial: bool) -> Callable:
    """Compile the chunked leaky average, with ragged chunks of 4."""

    def run(x: jax.Array, start: jax.Array, ids: jax.Array, initial: jax.Array) -> tuple:
        y, state = leaky_average(
            x,
            jnp.array([0.3]),
            initial_state=LeakyState(start, None),
            segment_ids=ids,
            initial_segment=initial if with_initial else None,
            chunk_size=4,
            implementation="xla",
        )
        return y, state.total

    return jax.jit(run)


@small
@given(rows_of_ids, maybe_row_ints)
def test_leaky_average_of_packed_rows(ids: list[list[int]], initial: list[int] | None):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, LENGTH, 1, 2)).astype(np.float32)
    start = draw.normal(size=(ROWS, 1, 2)).astype(np.float32)
    run = packed_average(initial is not None)
    out = run(x, start, np.asarray(ids), np.asarray(initial or [0] * ROWS))
    y, total = np.zeros(x.shape), start.astype(np.float64)
    for row, names in enumerate(ids):
        document = document_before(names, initial and initial[row])
        for t, name in enumerate(names):
            if name:
                kept = np.exp(-0.3) if name == document else 0.0
                document = name
                total[row] = kept * total[row] + x[row, t]
                y[row, t] = total[row]
    assert_close(out, (y, total), FORWARD)


def test_poison_rows():
    run = compiled(poison_rows)
    out = run([False, True, False], np.ones((3, 2, 2), np.float32))
    np.testing.assert_array_equal(out[1], np.nan)
    np.testing.assert_array_equal(out[::2], 1.0)
