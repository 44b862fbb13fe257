"""Rows of associative recall."""

import numpy as np
import pytest

from jaxmem.data.recall import NOT_SCORED, RecallShape, draw_rows
from jaxmem.errors import ConfigError, UnknownName

SHAPE = RecallShape(pairs=5, questions=3, keys=7, values=4, fillers=6)


@pytest.mark.parametrize("length", [15, 16, 40])
def test_every_question_has_one_answer_in_the_haystack(length: int):
    tokens, targets = draw_rows(np.random.default_rng(0), 50, length, SHAPE)
    assert tokens.shape == targets.shape == (50, length)
    assert tokens.dtype == targets.dtype == np.int32
    is_key = (tokens >= 6) & (tokens < 13)
    assert np.all(is_key.sum(1) == 5 + 3)
    haystack = length - 5  # three questions, the last without its answer
    for row, wanted, keys in zip(tokens, targets, is_key, strict=True):
        facts = {row[i]: row[i + 1] for i in np.flatnonzero(keys[:haystack])}
        assert len(facts) == 5
        asked = np.flatnonzero(wanted != NOT_SCORED)
        np.testing.assert_array_equal(asked, [haystack, haystack + 2, haystack + 4])
        assert len({row[i] for i in asked}) == 3
        assert all(facts[row[i]] == wanted[i] >= 13 for i in asked)
        assert all(row[i + 1] == wanted[i] for i in asked[:-1])
        assert np.all(wanted[asked] < SHAPE.vocabulary)


@pytest.mark.parametrize("length", [29, 30, 40])
def test_adjacent_facts_come_first_and_are_asked_for_repeatedly(length: int):
    shape = RecallShape(pairs=5, questions=10, keys=7, values=4, fillers=6, layout="adjacent")
    tokens, targets = draw_rows(np.random.default_rng(0), 50, length, shape)
    first = length - 19  # ten questions, the last without its answer
    asked = np.arange(first, length, 2)
    repeated = 0
    for row, wanted in zip(tokens, targets, strict=True):
        facts = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(facts) == 5
        assert all(6 <= key < 13 <= value < 17 for key, value in facts.items())
        assert np.all(row[10:first] < 6)
        np.testing.assert_array_equal(np.flatnonzero(wanted != NOT_SCORED), asked)
        assert all(facts[row[i]] == wanted[i] for i in asked)
        assert all(row[i + 1] == wanted[i] for i in asked[:-1])
        repeated += len({row[i] for i in asked}) < 5
    assert 0 < repeated < 50  # questions are drawn, not counted off


def test_facts_stand_everywhere():
    tokens, _ = draw_rows(np.random.default_rng(0), 500, 30, SHAPE)
    counts = ((tokens >= 6) & (tokens < 13)).sum(0)[:25]
    assert counts[24] == 0  # the last slot of the haystack holds a value or filler
    assert counts[:24].min() > 0.7 * counts[:24].mean()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="take 15 tokens, found rows of 14"):
        draw_rows(np.random.default_rng(0), 1, 14, SHAPE)
    with pytest.raises(ConfigError, match="no fewer keys and no more questions"):
        RecallShape(pairs=5, questions=6)
    with pytest.raises(ConfigError, match="no fewer keys and no more questions"):
        RecallShape(pairs=5, keys=4, questions=5)
    with pytest.raises(ConfigError, match="layout='adjacent', which repeats"):
        RecallShape(pairs=5, questions=6)
    with pytest.raises(ConfigError, match="no fewer keys"):
        RecallShape(pairs=5, keys=4, questions=6, layout="adjacent")
    with pytest.raises(UnknownName, match="Did you mean adjacent"):
        RecallShape(layout="adjacnt")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="fillers=0"):
        RecallShape(fillers=0)
