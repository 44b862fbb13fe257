"""The series of three moons: pinned systems, both observers, the time grid, seeded batches."""

import itertools

import numpy as np
import pytest

from jaxmem.data.three_moons import (
    GRID,
    LONGEST_CONTEXT,
    PHASE,
    TRAIN_PERIODS,
    VALIDATION_PERIODS,
    draw_starts,
    positions,
    system_period,
    time_step,
    windows,
)
from jaxmem.errors import ConfigError, DataError, UnknownName

KEPT = (*TRAIN_PERIODS, *VALIDATION_PERIODS)


def test_kept_systems_are_nine_of_the_35_that_repeat_soonest():
    triples = list(itertools.combinations((0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5), 3))
    soonest = sorted(map(system_period, triples))[: len(triples) // 4 + 1]
    assert set(KEPT) <= set(triples)
    assert sorted(map(system_period, KEPT)) == soonest == [2, 3, 3, 3, 3, 5, 6, 6, 6]


@pytest.mark.parametrize("periods", [(0.5, 1.0, 0.75), (0.0, 1.0, 2.0), (-0.5, 1.0, 2.0)])
def test_period_that_is_no_positive_half_is_refused(periods):
    with pytest.raises(ConfigError, match=r"multiples of 0\.5"):
        system_period(periods)


def test_time_step_of_the_paper():
    assert time_step(800) == pytest.approx(0.0225)
    assert 1 / time_step(240) == pytest.approx(240 / 18)
    assert time_step(800, "planet") == pytest.approx(0.015)


def test_sun_sees_each_moon_on_its_circle():
    x = positions((0.5, 1.0, 2.0), 7, 5, step=0.1)
    angles = 2 * np.pi * np.arange(7, 12)[:, None] * 0.1 / np.array([0.5, 1.0, 2.0]) + PHASE
    np.testing.assert_allclose(x[:, ::2], np.sin(angles), atol=1e-14)
    np.testing.assert_allclose(x[:, 1::2], np.cos(angles), atol=1e-14)


def test_planet_sees_the_others_relative_to_itself():
    sun = positions((0.5, 1.0, 2.0), 0, 9, step=0.1)
    planet = positions((0.5, 1.0, 2.0), 0, 9, step=0.1, observer="planet")
    np.testing.assert_allclose(planet[:, :2], sun[:, :2] - sun[:, 4:])
    np.testing.assert_allclose(planet[:, 2:4], sun[:, 2:4] - sun[:, 4:])
    np.testing.assert_array_equal(planet[:, 4:], sun[:, 4:])


def test_a_series_repeats_after_the_period_of_its_system():
    step, periods = time_step(90), (1.0, 2.0, 3.0)
    repeat = round(system_period(periods) / step)
    x = positions(periods, 3, repeat + 20, step=step)
    np.testing.assert_allclose(x[repeat:], x[:20], atol=1e-12)
    assert np.abs(x[repeat // 2 : repeat // 2 + 20] - x[:20]).max() > 0.5


def test_windows_are_a_function_of_seed_and_number_and_hold_what_follows():
    batch = windows("train", 4, context_len=30, batch_size=6, seed=2)
    again = windows("train", 4, context_len=30, batch_size=6, seed=2)
    np.testing.assert_array_equal(batch["x"], again["x"])
    np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
    assert batch["x"].shape == (6, 30, 6)
    assert batch["x"].dtype == np.float32
    for other in ({"number": 5, "seed": 2}, {"number": 4, "seed": 3}):
        changed = windows("train", context_len=30, batch_size=6, **other)
        assert not np.array_equal(batch["x"], changed["x"])


def test_every_training_system_occurs_and_validation_has_its_own():
    step = time_step(30)

    def shown(split: str) -> set[tuple[float, ...]]:
        x = windows(split, 0, context_len=30, batch_size=64, seed=1)["x"].astype(np.float64)
        angles = np.unwrap(np.arctan2(x[..., ::2], x[..., 1::2]), axis=1)
        speeds = (angles[:, -1] - angles[:, 0]) / (29 * step)
        # Steps of more than half an orbit look like steps backwards, so compare modulo a turn.
        return {
            next(p for p in KEPT if np.allclose(_alias(speed, step), _alias_of(p, step), atol=1e-3))
            for speed in speeds
        }

    def _alias(speed: np.ndarray, step: float) -> np.ndarray:
        return np.mod(speed * step / (2 * np.pi) + 1e-6, 1.0)

    def _alias_of(periods: tuple[float, ...], step: float) -> np.ndarray:
        return np.mod(step / np.array(periods) + 1e-6, 1.0)

    assert shown("train") == set(TRAIN_PERIODS)
    assert shown("validation") == set(VALIDATION_PERIODS)


def test_starts_stay_on_the_grid():
    starts = draw_starts(np.random.default_rng(0), 20_000, LONGEST_CONTEXT - 3)
    assert (starts.min(), starts.max()) == (0, GRID - 2 * (LONGEST_CONTEXT - 3) - 2)
    assert set(draw_starts(np.random.default_rng(0), 9, LONGEST_CONTEXT)) == {0}


@pytest.mark.parametrize("context_len", [0, LONGEST_CONTEXT + 1])
def test_windows_that_do_not_fit_are_refused(context_len: int):
    with pytest.raises(DataError, match="do not fit on the grid of 10000"):
        draw_starts(np.random.default_rng(0), 1, context_len)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="validation"):
        windows("valid", 0, context_len=30, batch_size=1, seed=0)
    with pytest.raises(UnknownName, match="planet"):
        time_step(30, "planets")
