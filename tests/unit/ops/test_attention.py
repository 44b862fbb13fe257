"""Dropout, defaults and errors of attention."""

import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, KernelUnsupported, ShapeError, UnknownName
from jaxmem.ops.attention import Dropout, Places, attention, attention_with_lse
from jaxmem.ops.dispatch import explain
from pallas_kernels._compat import stand_in_gpu

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
        ((jnp.ones((2, 3, 2, 0)),) * 3, {}, "an axis of q .* is empty"),
        ((ONES,) * 3, {"lag": 2, "window": 2}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"lag": -1}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"log_forget": jnp.ones((2, 3, 1))}, r"Pass one gate .*shape \(2, 3, 2\)"),
        ((ONES,) * 3, {"value_gate": jnp.ones((2, 2, 2))}, r"value_gate .*shape \(2, 3, 2\)"),
        ((ONES,) * 3, {"segment_ids": IDS, "places": Places(*(IDS,) * 4)}, "both `places` and"),
    ],
    ids=[
        "heads",
        "value-length",
        "places",
        "empty",
        "window",
        "lag",
        "gates",
        "values",
        "documents",
    ],
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


@pytest.mark.parametrize("clamp", [np.inf, -np.inf, np.nan, "5", ONES[0, 0, 0, 0]], ids=str)
def test_a_clamp_is_a_finite_number(clamp: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in (attention, attention_with_lse):
        with pytest.raises(ConfigError, match=r"attention: clamp=.* is not a finite number.*Use 5"):
            call(ONES, ONES, ONES, scale=1.0, clamp=clamp)


def test_value_gates_are_floating_point(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DTypeError, match="attention: value_gate is int32"):
        attention(ONES, ONES, ONES, scale=1.0, value_gate=jnp.ones((2, 3, 2), jnp.int32))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_what_clamp_and_value_gate_leave_alone(implementation: Any):
    q = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    options = {"scale": 0.5, "implementation": implementation}
    y, lse = attention_with_lse(q, q, q, **options)
    high, high_lse = attention_with_lse(q, q, q, clamp=1e3, **options)
    np.testing.assert_allclose(high, y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high_lse, lse, rtol=1e-6)
    # The softmax does not see the gates.
    shut, shut_lse = attention_with_lse(q, q, q, value_gate=jnp.zeros((2, 3, 2)), **options)
    np.testing.assert_array_equal(shut, 0.0)
    np.testing.assert_array_equal(shut_lse, lse)
    half, _ = attention_with_lse(q, q, q, value_gate=jnp.full((2, 3, 2), 0.5), **options)
    np.testing.assert_array_equal(half, 0.5 * y)


def test_below_the_clamp_all_keys_weigh_the_same():
    # With every logit clamped, the read is the mean of what is visible, whatever the queries are.
    v = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    q = jnp.abs(v)
    y = attention(q, q, v, scale=1.0, clamp=-1.0)
    mean = np.cumsum(v, axis=1) / np.arange(1, 4)[:, None, None]
    np.testing.assert_allclose(y, mean, rtol=1e-5, atol=1e-6)


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
    half = ONES.astype(jnp.bfloat16)
    with pytest.raises(KernelUnsupported, match="no CUDA GPU here"):
        explain("attention", half, half, half, implementation="cudnn")


def test_few_queries_take_no_kernel_on_a_gpu():
    def chosen(length: int, **options: Any) -> str:
        arrays = [jax.ShapeDtypeStruct((2, length, 2, 16), jnp.float32)] * 3
        with stand_in_gpu():
            return explain("attention", *arrays, **options).implementation

    assert [chosen(16), chosen(17)] == ["xla", "pallas"]
    assert chosen(16, implementation="pallas") == "pallas"


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas", "auto"])
def test_nothing_to_read(implementation: Any):
    """Rows, queries and keys may be none; where no key is, the result is 0."""
    options: dict[str, Any] = {"implementation": implementation, "causal": False}

    def shaped(batch: int, queries: int, keys: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.ones((batch, n, 2, 4)) for n in (queries, keys, keys))

    for sizes in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        y, lse = attention_with_lse(*shaped(*sizes), **options)
        np.testing.assert_array_equal(y, jnp.zeros((*sizes[:2], 2, 4)))
        np.testing.assert_array_equal(lse, jnp.full((*sizes[:2], 2), -jnp.inf))
        grads = jax.grad(lambda q, *a: jnp.sum(attention(q, *a, **options)))(*shaped(*sizes))
        np.testing.assert_array_equal(grads, jnp.zeros((*sizes[:2], 2, 4)))


@pytest.mark.parametrize(
    "options",
    [{"lag": 1}, {"window": 3}, {"log_forget": jnp.zeros((2, 3, 2))}],
    ids=["lag", "window", "log_forget"],
)
def test_without_order_there_are_no_distances(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="lag, window and log_forget are about the order"):
        attention(ONES, ONES, ONES, causal=False, **options)


def test_both_functions_take_the_same():
    signatures = [inspect.signature(call).parameters for call in (attention, attention_with_lse)]
    assert signatures[0] == signatures[1]
    kinds = {name: p.kind for name, p in signatures[0].items()}
    positional = [n for n, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v"]
    assert signatures[0]["scale"].default is None


def test_numbers_of_numpy_and_a_scale_of_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    expected = attention(ONES, ONES, ONES, scale=0.5)
    x = np.ones(ONES.shape)  # float64, which must not warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (None, np.float32(0.5), np.float64(0.5), np.full(2, 0.5)):
            found = attention(x, x, x, scale=scale)
            np.testing.assert_array_equal(found, expected)


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
