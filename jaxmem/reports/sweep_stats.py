"""Means over seeds with their confidence intervals, and whether they order cells as published."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from jaxmem.reports.sweep_suite import Suite

CONFIDENCE = 0.95
OVERLAP = "the intervals overlap"


class Estimate(NamedTuple):
    """The mean of one number over seeds."""

    mean: float
    margin: float | None
    """Half width of the 95 % confidence interval of the mean; None for a single seed."""
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, None for a single seed."""
        return None if self.margin is None else (self.mean - self.margin, self.mean + self.margin)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate the mean of what seeds are drawn from; None without a value.

    mean ± t s / sqrt(n), with s the standard deviation over the n values and t the 97.5 % quantile
    of Student's distribution with n - 1 degrees of freedom.
    """
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1)
    from scipy.special import stdtrit

    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


class Verdict(NamedTuple):
    """What our means say about one published order."""

    better: str
    """Label of the cell that is published as the better one."""
    worse: str
    verdict: Literal["agree", "disagree", "undecided"]
    reason: str
    """Why it is undecided, else empty."""


def verdicts(suite: Suite, estimates: Mapping[str, Estimate | None]) -> list[Verdict]:
    """Compare our order with the published one: of numbers that differ, and of the suite's claims.

    Means whose intervals share a point are undecided. That is careful: a test of the difference
    finds some of these pairs different.

    Args:
      suite: says which numbers were published and which direction is better.
      estimates: by label; None where no run is finished.
    """
    sign = 1 if suite.direction == "lower" else -1
    published = [(sign * c.published, c) for c in suite.cells if c.published is not None]
    found = []
    for (a, first), (b, second) in combinations(published, 2):
        if a != b:
            better, worse = (first, second) if a < b else (second, first)
            found.append(_verdict(better.label, worse.label, estimates, sign))
    return found + [_verdict(*claim, estimates, sign) for claim in suite.claims]


def _verdict(
    better: str, worse: str, estimates: Mapping[str, Estimate | None], sign: int
) -> Verdict:
    labels = (better, worse)
    ours = [estimates[label] for label in labels]
    if None in ours:
        return Verdict(*labels, "undecided", "a cell has no finished run")
    if any(one.interval is None for one in ours if one):
        return Verdict(*labels, "undecided", "a cell has one seed, so no interval")
    (low, high), (other_low, other_high) = (one.interval for one in ours if one and one.interval)
    if max(low, other_low) <= min(high, other_high):
        return Verdict(*labels, "undecided", OVERLAP)
    return Verdict(*labels, "agree" if sign * (low - other_low) < 0 else "disagree", "")


def published_order(suite: Suite) -> str:
    """Name the cells from the best published number on, equal ones joined by `=`."""
    values = {cell.label: cell.published for cell in suite.cells if cell.published is not None}
    return _order(values, suite)


def our_order(suite: Suite, estimates: Mapping[str, Estimate | None]) -> str:
    """Name the cells that have a published number from our best mean on."""
    labels = [cell.label for cell in suite.cells if cell.published is not None]
    found = {label: one.mean for label in labels if (one := estimates[label]) is not None}
    return _order(found, suite)


def _order(values: Mapping[str, float], suite: Suite) -> str:
    ordered = sorted(values.items(), key=lambda item: item[1], reverse=suite.direction == "higher")
    text = ""
    for place, (label, value) in enumerate(ordered):
        if place:
            text += " = " if value == ordered[place - 1][1] else ", "
        text += f"{label} {value:.4g}"
    return text or "none"
