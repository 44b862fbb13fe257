"""Associative recall: facts hidden in a haystack of filler, and questions about them at the end.

A row holds `pairs` facts, each a key token followed by a value token, at random places among filler
tokens, and ends with questions: a key and its value again. Keys of a row differ, values need not.
Facts and questions are as many in a row of any length, so a longer row is only a larger haystack.

In the multi-query form (`layout="adjacent"`) the facts stand at the start, one behind another, and
each question is about any of them, so there may be more questions than facts.

Tokens: 0 ... F-1 filler, F ... F+K-1 keys, F+K ... F+K+V-1 values.

Reference: the needle in a haystack of RULER (arXiv 2404.06654) and the associative recall of MQAR
  (arXiv 2312.04927), with the smallest parts of both.
"""

import dataclasses
from typing import Literal

import numpy as np

from jaxmem.data.scored import NOT_SCORED, ScoredRows
from jaxmem.errors import ConfigError, unknown_name

Layout = Literal["scattered", "adjacent"]
LAYOUTS: tuple[Layout, ...] = ("scattered", "adjacent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallShape:
    """How many facts, how many questions, and the sizes of the three vocabularies."""

    pairs: int = 8
    """Facts of a row."""
    questions: int = 8
    """Questions at the end of the row, in random order: about a fact each, or about any."""
    keys: int = 32
    """Tokens that are keys."""
    values: int = 16
    """Tokens that are values."""
    fillers: int = 16
    """Tokens of the haystack."""
    # Not in repr, which the fingerprints of runs without this field are made of.
    layout: Layout = dataclasses.field(default="scattered", repr=False)
    """scattered: facts among filler, asked for once; adjacent: facts first, filler behind them, and
    questions drawn with repetition."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown_name("layout", self.layout, LAYOUTS)
        for name in ("pairs", "questions", "values", "fillers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        too_many = self.layout == "scattered" and self.questions > self.pairs
        if self.keys < self.pairs or too_many:
            raise ConfigError(
                f"{self.pairs} facts with keys of their own out of {self.keys}, and "
                f"{self.questions} questions about them: use no fewer keys and no more questions "
                "than pairs, or layout='adjacent', which repeats questions."
            )

    @property
    def vocabulary(self) -> int:
        """Number of all tokens."""
        return self.fillers + self.keys + self.values

    @property
    def shortest(self) -> int:
        """Length of a row without filler, less the last value, which is only a target."""
        return 2 * (self.pairs + self.questions) - 1


def draw_rows(rng: np.random.Generator, rows: int, length: int, shape: RecallShape) -> ScoredRows:
    """Draw rows of `length` tokens, of which the keys of questions are scored.

    Raises:
      ConfigError: facts and questions do not fit.
    """
    if length < shape.shortest:
        raise ConfigError(
            f"{shape.pairs} facts and {shape.questions} questions take {shape.shortest} tokens, "
            f"found rows of {length}. Use a longer `model.context_len`, or fewer of both."
        )
    facts, asked = shape.pairs, shape.questions
    haystack = length + 1 - 2 * asked
    tokens = np.empty((rows, length + 1), np.int32)
    tokens[:, :haystack] = rng.integers(shape.fillers, size=(rows, haystack))
    keys = shape.fillers + _distinct(rng, rows, shape.keys, facts)
    first_value = shape.fillers + shape.keys
    values = first_value + rng.integers(shape.values, size=(rows, facts))
    row = np.arange(rows)[:, None]
    if shape.layout == "adjacent":
        slots = np.broadcast_to(2 * np.arange(facts), (rows, facts))
    else:
        # Distinct slots of a haystack where a fact takes one, then each moved behind those before.
        slots = np.sort(_distinct(rng, rows, haystack - facts, facts), axis=1) + np.arange(facts)
    tokens[row, slots], tokens[row, slots + 1] = keys, values
    if shape.layout == "adjacent":
        order = rng.integers(facts, size=(rows, asked))
    else:
        order = _distinct(rng, rows, facts, asked)
    tokens[:, haystack::2], tokens[:, haystack + 1 :: 2] = keys[row, order], values[row, order]
    targets = np.full((rows, length), NOT_SCORED, np.int32)
    targets[:, haystack::2] = values[row, order]
    return ScoredRows(tokens[:, :-1], targets)


def _distinct(rng: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """Draw `count` different numbers below `size` for each row, in random order."""
    return np.argsort(rng.random((rows, size)), axis=1)[:, :count]
