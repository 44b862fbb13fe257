"""Invariants of packing documents into rows."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.data.packing import fill_row, plan_packing, shift_row
from jaxmem.errors import ConfigError

LENGTHS = st.lists(st.integers(0, 40), max_size=30).map(lambda x: np.array(x, np.int64))


def packed(lengths, row_len):
    """Pack documents whose tokens all differ."""
    plan = plan_packing(lengths, row_len)
    tokens = np.arange(1, lengths.sum() + 1)
    starts = np.cumsum(lengths) - lengths
    return plan, [fill_row(plan, row, tokens, starts) for row in range(plan.num_rows)]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 20))
def test_each_token_stands_in_exactly_one_cell(lengths, row_len):
    plan, rows = packed(lengths, row_len)
    cells = np.concatenate([cells[segments > 0] for cells, segments in rows] or [np.zeros(0)])
    np.testing.assert_array_equal(np.sort(cells), np.arange(1, lengths.sum() + 1))
    assert all(cells.shape == (row_len,) for cells, _ in rows)
    assert not any(cells[segments == 0].any() for cells, segments in rows)
    assert plan.fill * plan.num_rows * row_len == pytest.approx(lengths.sum())


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 20))
def test_segments_count_from_one_and_are_runs_of_one_document(lengths, row_len):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    _, rows = packed(lengths, row_len)
    for cells, segments in rows:
        real = segments[segments > 0]
        assert set(np.diff(real)) <= {0, 1}
        assert real[0] == 1
        np.testing.assert_array_equal(segments[: len(real)], real)  # padding comes last
        for segment in range(1, real[-1] + 1):
            run = cells[segments == segment]
            np.testing.assert_array_equal(run, np.arange(run[0], run[0] + len(run)))
            assert len(set(owner[run - 1])) == 1


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 20))
def test_pieces_are_full_rows_and_one_remainder(lengths, row_len):
    plan = plan_packing(lengths, row_len)
    for document, length in enumerate(lengths):
        mine = plan.document == document
        pieces = dict(zip(plan.start[mine].tolist(), plan.length[mine].tolist(), strict=True))
        assert pieces == {s: min(row_len, length - s) for s in range(0, length, row_len)}


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 20))
def test_best_fit_leaves_no_two_half_empty_rows(lengths, row_len):
    plan = plan_packing(lengths, row_len)
    used = np.add.reduceat(plan.length, plan.row_bounds[:-1]) if plan.num_rows else np.zeros(0)
    assert (used <= row_len).all()
    assert (used * 2 <= row_len).sum() <= 1


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 20))
def test_targets_follow_their_token_within_the_piece(lengths, row_len):
    _, rows = packed(lengths, row_len)
    for cells, segments in rows:
        example = shift_row(cells, segments)
        scored = example["targets"] >= 0
        np.testing.assert_array_equal(example["targets"][scored], example["tokens"][scored] + 1)
        ends = np.append(segments[1:] != segments[:-1], True)[:-1]
        np.testing.assert_array_equal(~scored, ends | (segments[:-1] == 0))
        assert all(array.shape == (row_len - 1,) for array in example.values())
        assert all(array.dtype == np.int32 for array in example.values())


def test_plan_is_a_function_of_the_lengths():
    lengths = np.random.default_rng(0).integers(0, 50, 200)
    first, second = plan_packing(lengths, 33), plan_packing(lengths.copy(), 33)
    for name in ("document", "start", "length", "offset", "row_bounds"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_hundred_thousand_documents_take_seconds():
    lengths = np.random.default_rng(0).geometric(1 / 300, 100_000)
    begin = time.perf_counter()
    plan = plan_packing(lengths, 1025)
    assert time.perf_counter() - begin < 5  # measured 0.15 s
    assert plan.fill > 0.999


def test_rows_need_two_tokens():
    with pytest.raises(ConfigError, match="at least 2"):
        plan_packing(np.array([3]), 1)
