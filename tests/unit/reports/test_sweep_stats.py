"""Means over seeds, their intervals, and the order of cells beside the published one."""

import dataclasses
import math

import pytest

from jaxmem.errors import ConfigError
from jaxmem.reports.sweep_stats import (
    Estimate,
    estimate,
    our_order,
    published_order,
    verdicts,
)
from jaxmem.reports.sweep_suite import Cell, Suite

# Quantiles of Student's distribution as printed in tables, to three decimals.
T975 = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}


@pytest.mark.parametrize("count", T975)
def test_interval_is_that_of_students_t(count):
    values = [float(i * i) for i in range(count)]
    mean = sum(values) / count
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    found = estimate(values)
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(mean), count)
    assert found.margin == pytest.approx(T975[count] * spread / math.sqrt(count), rel=2e-4)
    assert found.interval == (found.mean - found.margin, found.mean + found.margin)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert estimate([2.5]) == Estimate(2.5, None, 1)
    assert estimate([2.5]).interval is None
    assert estimate([]) is None


def suite(direction="lower", **published):
    cells = [Cell(label=k, preset="gpt_tiny", published=v) for k, v in published.items()]
    return Suite(cells=tuple(cells), seeds=(0, 1), direction=direction)


def test_pairs_agree_disagree_or_stay_undecided():
    ours = {"a": Estimate(1.0, 0.1, 3), "b": Estimate(2.0, 0.1, 3), "c": Estimate(1.15, 0.1, 3)}
    found = verdicts(suite(a=3.0, b=2.0, c=1.0), ours)
    assert [one[:3] for one in found] == [
        ("b", "a", "disagree"),
        ("c", "a", "undecided"),
        ("c", "b", "agree"),
    ]
    assert [one.reason for one in found] == ["", "the intervals overlap", ""]


def test_higher_may_be_better():
    ours = {"a": Estimate(0.9, 0.01, 3), "b": Estimate(0.5, 0.01, 3)}
    assert verdicts(suite("higher", a=90.0, b=80.0), ours)[0][:3] == ("a", "b", "agree")
    assert verdicts(suite("lower", a=90.0, b=80.0), ours)[0][:3] == ("b", "a", "agree")
    assert verdicts(suite("higher", a=70.0, b=80.0), ours)[0][:3] == ("b", "a", "disagree")


def test_equal_or_missing_published_numbers_make_no_pair():
    ours = dict.fromkeys("abc", Estimate(1.0, 0.1, 2))
    assert verdicts(suite(a=1.0, b=1.0, c=None), ours) == []


def test_claims_without_numbers_are_judged_too():
    ours = {"a": Estimate(1.0, 0.1, 3), "b": Estimate(2.0, 0.1, 3)}
    claimed = dataclasses.replace(suite(a=None, b=None), claims=(("b", "a"), ("a", "b")))
    found = [one[:3] for one in verdicts(claimed, ours)]
    assert found == [("b", "a", "disagree"), ("a", "b", "agree")]


def test_missing_runs_and_single_seeds_are_undecided_with_the_reason():
    ours = {"a": None, "b": Estimate(1.0, None, 1), "c": Estimate(5.0, 0.1, 2)}
    reasons = [one.reason for one in verdicts(suite(a=1.0, b=2.0, c=3.0), ours)]
    assert reasons == ["a cell has no finished run"] * 2 + ["a cell has one seed, so no interval"]


def test_intervals_that_touch_are_undecided():
    ours = {"a": Estimate(1.0, 0.5, 2), "b": Estimate(2.0, 0.5, 2)}
    assert verdicts(suite(a=1.0, b=2.0), ours)[0].verdict == "undecided"


def test_orders_are_told_best_first():
    cells = suite(a=3.0, b=2.0, c=2.0, d=None)
    assert published_order(cells) == "b 2 = c 2, a 3"
    ours = {"a": Estimate(1.0, None, 1), "b": None, "c": Estimate(0.25, None, 1), "d": None}
    assert our_order(cells, ours) == "c 0.25, a 1"
    assert published_order(suite("higher", a=1.0, b=2.0)) == "b 2, a 1"
    assert our_order(cells, dict.fromkeys("abcd")) == "none"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cell(label="a/b", preset="p"), "label 'a/b'"),
        (lambda: Cell(label="a", preset="p", overrides="--run.seed=3"), "--run.seed"),
        (lambda: Cell(label="a", preset="p", overrides="--help"), "--help"),
        (lambda: Cell(label="a", preset="p", overrides="--x 'y"), "quotation"),
        (lambda: Cell(label="a", preset="p", published=float("nan")), "published=nan"),
        (lambda: Suite(cells=(), seeds=(0,)), "at least one cell"),
        (lambda: suite(), "at least one cell"),
        (lambda: Suite(cells=(Cell(label="a", preset="p"),) * 2, seeds=(0,)), "label a more"),
        (lambda: Suite(cells=(Cell(label="a", preset="p"),), seeds=(1, 2, 1)), "seed 1 more"),
        (lambda: Suite(cells=(Cell(label="a", preset="p"),), seeds=(-1,)), "seed -1"),
        (
            lambda: dataclasses.replace(suite(a=1.0), claims=(("a", "z"),)),
            "something of z, which is none",
        ),
        (lambda: suite("down", a=1.0), "direction='down'"),
    ],
)
def test_suites_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
