"""Dropout, defaults and errors of attention."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError, UnknownName
from jaxmem.ops.attention import Dropout, Places, attention
from jaxmem.ops.dispatch import explain

ONES = jnp.ones((2, 3, 2, 4))
IDS = jnp.ones((2, 3), jnp.int32)


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
    ("arrays", "options", "words"),
    [
        ((ONES, jnp.ones((2, 3, 3, 4)), jnp.ones((2, 3, 3, 4))), {}, "do not fit together"),
        ((ONES, ONES, jnp.ones((2, 2, 2, 4))), {}, "do not fit together"),
        ((ONES, *(jnp.ones((2, 5, 2, 4)),) * 2), {}, "3 queries and 5 keys without `places`"),
        ((jnp.ones((2, 0, 2, 4)),) * 3, {}, "an axis of q .* is empty"),
        ((ONES,) * 3, {"lag": 2, "window": 2}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"lag": -1}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"log_forget": jnp.ones((2, 3, 1))}, r"Pass one gate .*shape \(2, 3, 2\)"),
        ((ONES,) * 3, {"segment_ids": IDS, "places": Places(*(IDS,) * 4)}, "both `places` and"),
    ],
    ids=["heads", "value-length", "places", "empty", "window", "lag", "gates", "documents"],
)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_calls_that_make_no_sense(
    arrays: Any,
    options: dict[str, Any],
    words: str,
    implementation: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=words):
        attention(*arrays, scale=1.0, **options, implementation=implementation)


def test_names_of_implementations(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KernelUnsupported, match="attention cannot run implementation 'cudnn'"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="cudnn")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UnknownName, match=r"Unknown implementation 'xlaa'\. Did you mean xla"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="xlaa")


def test_auto_on_a_cpu_says_what_it_takes():
    choice = explain("attention", ONES, ONES, ONES, scale=1.0)
    assert choice.implementation == "xla"
    assert [r.implementation for r in choice.rejected] == ["cudnn", "pallas"]


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_padding_between_tokens_counts_neither_in_distances_nor_with_its_gates(
    implementation: Any,
):
    x = jax.random.normal(jax.random.key(3), (1, 9, 1, 4))
    gates = -jax.nn.softplus(jax.random.normal(jax.random.key(4), (1, 9, 1)))
    rule = {"scale": 1.0, "lag": 2, "window": 4, "implementation": implementation}
    ids = jnp.asarray([[1, 0, 1, 1, 0, 0, 1, 1, 1]])
    real = np.flatnonzero(ids[0])
    padded = attention(x, x, x, segment_ids=ids, log_forget=gates, **rule)
    alone = x[:, real]
    np.testing.assert_allclose(
        padded[:, real],
        attention(alone, alone, alone, log_forget=gates[:, real], **rule),
        rtol=1e-6,
        atol=1e-6,
    )
