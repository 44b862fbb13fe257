"""Dropout as a hash of the place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._dropout import dropout_seed, kept

ROWS, COLUMNS = 500, 800


@functools.partial(jax.jit, static_argnums=1)
def factors(key: jax.Array, rate: float) -> jax.Array:
    rows, columns = jnp.arange(ROWS)[:, None], jnp.arange(COLUMNS)[None, :]
    return kept(*dropout_seed(key), rows, columns, rate)


@functools.cache
def mask(seed: int, rate: float) -> np.ndarray:
    """Return what is dropped."""
    found = np.asarray(factors(jax.random.key(seed), rate))
    kept_factor = np.float32(1 / (1 - rate))
    assert set(np.unique(found)) <= {np.float32(0), kept_factor}
    return found == 0


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_rate_by_row_and_column(rate: float):
    dropped = mask(0, rate)
    spread = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 4 * spread / np.sqrt(dropped.size)
    # Means of rows and of columns vary as those of independent draws do.
    assert np.std(dropped.mean(1)) == pytest.approx(spread / np.sqrt(COLUMNS), rel=0.15)
    assert np.std(dropped.mean(0)) == pytest.approx(spread / np.sqrt(ROWS), rel=0.15)


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (1, -1), (16, 0), (0, 64)])
def test_neighbours_are_not_correlated(shift: tuple[int, int]):
    dropped = mask(1, 0.5) - 0.5
    moved = np.roll(dropped, shift, axis=(0, 1))
    assert abs(np.mean(dropped * moved)) * 4 < 4 / np.sqrt(dropped.size)


def test_seeds_give_other_masks():
    first, second = mask(2, 0.5) - 0.5, mask(3, 0.5) - 0.5
    assert abs(np.mean(first * second)) * 4 < 4 / np.sqrt(first.size)
