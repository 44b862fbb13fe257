"""Dropout, defaults and errors of attention."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError, UnknownName
from jaxmem.ops.attention import Dropout, Places, attention

ONES = jnp.ones((2, 3, 2, 4))


def test_dropout_keeps_the_mean_and_drops_its_share():
    # Of one visible key per query, a read of ones is 1 / (1 - rate), or 0 where dropped.
    length, rate = 70, 0.3
    x = jnp.ones((2, length, 4, 1))
    index = jnp.broadcast_to(jnp.arange(length), (2, length))
    alone = Places(index, index, index + 1, index + 1)
    key = jax.random.key(0)
    y = attention(x, x, x, scale=1.0, places=alone, dropout=Dropout(rate, key))
    values, counts = np.unique(np.asarray(y), return_counts=True)
    np.testing.assert_allclose(values, [0.0, 1 / (1 - rate)], rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(counts[0] / y.size - rate) < 4 * spread
    again = attention(x, x, x, scale=1.0, places=alone, dropout=Dropout(rate, key))
    np.testing.assert_array_equal(again, y)
    other = attention(x, x, x, scale=1.0, places=alone, dropout=Dropout(rate, jax.random.key(1)))
    assert not np.array_equal(other, y)


def test_dropout_of_rate_zero_is_none():
    q = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    dropped = attention(q, q, q, scale=1.0, dropout=Dropout(0.0, jax.random.key(0)))
    np.testing.assert_array_equal(dropped, attention(q, q, q, scale=1.0))


def test_one_scale_is_that_of_every_head():
    q = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    np.testing.assert_array_equal(
        attention(q, q, q, scale=0.5), attention(q, q, q, scale=jnp.full(2, 0.5))
    )


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        (jnp.ones((2, 3, 1, 4)), ONES, "do not fit together"),
        (ONES, jnp.ones((2, 2, 2, 4)), "do not fit together"),
        (jnp.ones((2, 5, 2, 4)), jnp.ones((2, 5, 2, 4)), "3 queries and 5 keys without `places`"),
    ],
    ids=["heads", "value-length", "places"],
)
def test_shapes_that_do_not_fit(
    k: jax.Array, v: jax.Array, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=words):
        attention(ONES, k, v, scale=1.0)


def test_names_of_implementations(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KernelUnsupported, match="attention has no implementation 'pallas'"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="pallas")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UnknownName, match=r"Unknown implementation 'xlaa'\. Did you mean xla"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="xlaa")
