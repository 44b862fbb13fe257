"""Dropout and errors of the persistent read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops.attention import Dropout
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels import persistent_read as kernels


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


Q, TABLE, SCALE = shaped(2, 3, 2, 4), shaped(1, 2, 5, 4), shaped(2)


def test_dropout_keeps_the_mean():
    # Of one pair and a value of 1, a read is 1 / (1 - rate), or 0 where dropped.
    q, table, rate = np.ones((4, 70, 4, 1), np.float32), np.ones((1, 4, 1, 1), np.float32), 0.3

    @jax.jit
    def read(q: jax.Array, table: jax.Array, key: jax.Array) -> jax.Array:
        return persistent_read(q, table, table, scale=jnp.ones(4), dropout=Dropout(rate, key))

    y = np.asarray(read(q, table, jax.random.key(0)))
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_allclose(values, [0.0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(counts[0] / y.size - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)


def test_dropout_of_rate_zero_is_none():
    draw = np.random.default_rng(0)
    q, table = (draw.normal(size=a.shape).astype(np.float32) for a in (Q, TABLE))

    @jax.jit
    def read(q: jax.Array, table: jax.Array) -> list[jax.Array]:
        choices = (Dropout(0.0, jax.random.key(0)), None)
        return [persistent_read(q, table, table, scale=jnp.ones(2), dropout=d) for d in choices]

    np.testing.assert_array_equal(*read(q, table))


def test_tiles_that_do_not_fit_are_refused_before_anything_is_compiled():
    tiles = kernels.find_config(jnp.float32, 4, 4, rows=6, tables=2)
    greedy = dataclasses.replace(tiles, block_rows=2**16)
    run = functools.partial(persistent_read, implementation="pallas", config=greedy)
    with pytest.raises(KernelUnsupported, match="bytes of shared memory"):
        jax.eval_shape(lambda q, table, scale: run(q, table, table, scale=scale), Q, TABLE, SCALE)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (shaped(1, 3, 5, 4), shaped(1, 3, 5, 4)),
        (shaped(1, 2, 5, 3), TABLE),
        (TABLE, shaped(2, 2, 5, 4)),
        (TABLE, shaped(1, 2, 6, 4)),
    ],
    ids=["heads", "key-width", "banks", "pairs"],
)
def test_banks_that_do_not_fit(keys: Any, values: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"persistent_read: .* do not fit"):
        jax.eval_shape(
            lambda q, k, v, scale: persistent_read(q, k, v, scale=scale), Q, keys, values, SCALE
        )
