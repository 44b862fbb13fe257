"""Dropout and errors of the persistent read."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops.attention import Dropout
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels import persistent_read as kernels

Q, TABLE, SCALE = jnp.ones((2, 3, 2, 4)), jnp.ones((1, 2, 5, 4)), jnp.ones(2)


def test_dropout_keeps_the_mean():
    # Of one pair and a value of 1, a read is 1 / (1 - rate), or 0 where dropped.
    q, table, rate = jnp.ones((4, 70, 4, 1)), jnp.ones((1, 4, 1, 1)), 0.3
    y = persistent_read(
        q, table, table, scale=jnp.ones(4), dropout=Dropout(rate, jax.random.key(0))
    )
    values, counts = np.unique(np.asarray(y), return_counts=True)
    np.testing.assert_allclose(values, [0.0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(counts[0] / y.size - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)


def test_dropout_of_rate_zero_is_none():
    q = jax.random.normal(jax.random.key(0), Q.shape)
    tables = jax.random.normal(jax.random.key(1), TABLE.shape)
    dropped = persistent_read(
        q, tables, tables, scale=SCALE, dropout=Dropout(0.0, jax.random.key(0))
    )
    np.testing.assert_array_equal(dropped, persistent_read(q, tables, tables, scale=SCALE))


def test_tiles_that_do_not_fit_are_refused_before_anything_is_compiled():
    tiles = kernels.find_config(jnp.float32, 4, 4, rows=6, tables=2)
    greedy = dataclasses.replace(tiles, block_rows=2**16)
    with pytest.raises(KernelUnsupported, match="bytes of shared memory"):
        persistent_read(Q, TABLE, TABLE, scale=SCALE, implementation="pallas", config=greedy)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (jnp.ones((1, 3, 5, 4)), jnp.ones((1, 3, 5, 4))),
        (jnp.ones((1, 2, 5, 3)), TABLE),
        (TABLE, jnp.ones((2, 2, 5, 4))),
        (TABLE, jnp.ones((1, 2, 6, 4))),
    ],
    ids=["heads", "key-width", "banks", "pairs"],
)
def test_banks_that_do_not_fit(keys: jax.Array, values: jax.Array, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"persistent_read: .* do not fit"):
        persistent_read(Q, keys, values, scale=SCALE)
