"""Three moons on circles: the continuous toy series on which disentanglement can be watched.

A moon of period p stands at angle 2 π t / p + 0.3; what is seen of it is the pair (sin, cos). A
system is a triple of periods. It repeats after the least common multiple of the three, which is
much later than the slowest moon does.

Reference: Memory Mosaics (arXiv 2405.06394), sec. 5.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxmem.errors import ConfigError, DataError, unknown_name

Periods = tuple[float, float, float]
Observer = Literal["sun", "planet"]

TRAIN_PERIODS: tuple[Periods, ...] = (
    (0.5, 1.0, 2.0),
    (0.5, 1.0, 1.5),
    (0.5, 1.0, 3.0),
    (0.5, 1.5, 3.0),
    (1.0, 1.5, 3.0),
    (0.5, 1.0, 2.5),
    (1.0, 1.5, 2.0),
    (0.5, 1.5, 2.0),
)
"""The systems seen in training. The authors sort all 35 triples out of {0.5, 1, ..., 3.5} by the
time after which they repeat and keep the first nine; how their sort breaks ties is pinned here."""
VALIDATION_PERIODS: tuple[Periods, ...] = ((1.0, 2.0, 3.0),)
"""The ninth system, never seen in training."""
SPLITS: Mapping[str, tuple[Periods, ...]] = {
    "train": TRAIN_PERIODS,
    "validation": VALIDATION_PERIODS,
}
FEATURES = 6
"""Numbers per time step: sin and cos of each moon."""
PHASE = 0.3
"""Angle of every moon at time 0, in radians."""
GRID = 10_000
"""Time steps from which a window's start is drawn."""
LONGEST_CONTEXT = (GRID - 2) // 2
"""Time steps of the longest window that the grid has room for."""

_REPEATS: Mapping[str, int] = {"sun": 3, "planet": 2}
"""How often the slowest system repeats within a window, by observer."""


def system_period(periods: Periods) -> float:
    """Return the time after which the whole system repeats: the least common multiple.

    Raises:
      ConfigError: a period is not a positive multiple of one half.
    """
    halves = [round(2 * period) for period in periods]
    if any(half < 1 or half != 2 * period for half, period in zip(halves, periods, strict=True)):
        raise ConfigError(
            f"Periods {periods} are not all positive multiples of 0.5. Give three such numbers."
        )
    return math.lcm(*halves) / 2


def time_step(context_len: int, observer: Observer = "sun") -> float:
    """Return the time between two steps, 6 n / context_len.

    The slowest system repeats after 6 time units, and a window shows that n times: 3 times from
    the sun and twice from the planet.

    Raises:
      UnknownName: there is no such observer.
    """
    if observer not in _REPEATS:
        raise unknown_name("observer", observer, _REPEATS)
    # Divided in this order, the result equals that of the authors' 1 / (C / 6 / n) to the last bit.
    return 1.0 / (context_len / 6.0 / _REPEATS[observer])


def positions(
    periods: Periods, start: int, steps: int, *, step: float, observer: Observer = "sun"
) -> np.ndarray:
    """Return what is seen of three moons, [steps 6] in float64.

    Columns are sin and cos of the first, second and third moon at t = (start + i) step. The sun
    sees them as they are; the planet, riding on the third moon, sees the first two relative to it:
    the third's pair is subtracted from theirs, and stays itself.

    Args:
      periods: of the three moons, in time units.
      start: first place on the time grid.
      steps: how many.
      step: time between two steps, as `time_step` gives it.
      observer: `sun` or `planet`.
    """
    times = np.arange(start, start + steps) * step
    angles = 2 * np.pi * times[:, None] / np.asarray(periods) + PHASE
    seen = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    if observer == "planet":
        seen[:, :2] -= seen[:, 2:]
    return seen.reshape(steps, FEATURES)


def draw_starts(rng: np.random.Generator, count: int, context_len: int) -> np.ndarray:
    """Draw where windows of `context_len` steps begin: integers in [0, 10000 - 2 C - 1).

    Raises:
      DataError: the grid has no room for such windows.
    """
    if not 1 <= context_len <= LONGEST_CONTEXT:
        raise DataError(
            f"Windows of {context_len} time steps do not fit on the grid of {GRID}. "
            f"Use between 1 and {LONGEST_CONTEXT} (`model.context_len`)."
        )
    return rng.integers(0, GRID - 2 * context_len - 1, size=count)


def draw(
    systems: int, number: int, *, context_len: int, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw which system and which start each row of a batch has, uniformly; see `windows`."""
    rng = np.random.default_rng([seed, number])
    which = rng.integers(systems, size=batch_size)
    return which, draw_starts(rng, batch_size, context_len)


def windows(
    split: str,
    number: int,
    *,
    context_len: int,
    batch_size: int,
    seed: int,
    observer: Observer = "sun",
) -> dict[str, np.ndarray]:
    """Return one batch {"x": [B T 6], "y": [B T 6]} in float32.

    Each row has its own triple of the split and its own start; y is x one step later.

    Args:
      split: `train` or `validation`.
      number: of the batch; with the seed it decides what is drawn.
      context_len: time steps T per row.
      batch_size: rows B.
      seed: of a stream of batches.
      observer: who looks.

    Raises:
      DataError: `context_len` does not fit on the time grid.
      UnknownName: there is no such split or observer.
    """
    systems = SPLITS.get(split)
    if systems is None:
        raise unknown_name("split", split, SPLITS)
    which, starts = draw(
        len(systems), number, context_len=context_len, batch_size=batch_size, seed=seed
    )
    step = time_step(context_len, observer)
    rows = [
        positions(systems[system], start, context_len + 1, step=step, observer=observer)
        for system, start in zip(which, starts, strict=True)
    ]
    series = np.stack(rows).astype(np.float32)
    return {"x": series[:, :-1], "y": series[:, 1:]}
