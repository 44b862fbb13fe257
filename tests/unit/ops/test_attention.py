"""Dropout, defaults and errors of attention."""

import functools
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

ONES = jnp.asarray(np.ones((2, 3, 2, 4), np.float32))
IDS = jnp.asarray(np.ones((2, 3), np.int32))
Q = np.random.default_rng(0).normal(size=ONES.shape).astype(np.float32)


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_dropout_keeps_the_mean_and_drops_its_share():
    # Of one visible key per query, a read of ones is 1 / (1 - rate), or 0 where dropped.
    length, rate = 70, 0.3
    x = np.ones((2, length, 4, 1), np.float32)
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))

    @jax.jit
    def read(x: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
        alone = Places(index, index, index + 1, index + 1)
        return attention(x, x, x, scale=1.0, places=alone, dropout=Dropout(rate, key))

    key, other_key = (jax.random.key(n) for n in (0, 1))
    y = np.asarray(read(x, index, key))
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_allclose(values, [0.0, 1 / (1 - rate)], rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(counts[0] / y.size - rate) < 4 * spread
    np.testing.assert_array_equal(read(x, index, key), y)
    assert not np.array_equal(read(x, index, other_key), y)


def test_other_names_of_the_same():
    """No dropout and one of rate 0, a scale of every head and one for all."""

    @jax.jit
    def read(q: jax.Array) -> list[jax.Array]:
        none = Dropout(0.0, jax.random.key(0))
        scales = (0.5, jnp.full(2, 0.5))
        same = [attention(q, q, q, scale=0.5, dropout=none)]
        return same + [attention(q, q, q, scale=scale) for scale in scales]

    dropped, one, each = read(Q)
    np.testing.assert_array_equal(dropped, one)
    np.testing.assert_array_equal(each, one)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ((ONES, *(shaped(2, 3, 3, 4),) * 2), {}, "do not fit together"),
        ((ONES, ONES, shaped(2, 2, 2, 4)), {}, "do not fit together"),
        ((ONES, *(shaped(2, 5, 2, 4),) * 2), {}, "3 queries and 5 keys without `places`"),
        ((shaped(2, 3, 2, 0),) * 3, {}, "an axis of q .* is empty"),
        ((ONES,) * 3, {"lag": 2, "window": 2}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"lag": -1}, "Use 0 <= lag < window"),
        ((ONES,) * 3, {"log_forget": shaped(2, 3, 1)}, r"Pass one gate .*shape \(2, 3, 2\)"),
        ((ONES,) * 3, {"value_gate": shaped(2, 2, 2)}, r"value_gate .*shape \(2, 3, 2\)"),
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
    run = functools.partial(attention, scale=1.0, implementation=implementation)
    # Arrays among the options are abstract as well.
    plain = {n: a for n, a in options.items() if isinstance(a, int)}
    traced = {n: a for n, a in options.items() if n not in plain}
    with pytest.raises(ShapeError, match=words):
        jax.eval_shape(lambda a, o: run(*a, **o, **plain), arrays, traced)


@pytest.mark.parametrize("clamp", [np.inf, -np.inf, np.nan, "5", jnp.asarray(5.0)], ids=str)
def test_a_clamp_is_a_finite_number(clamp: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in (attention, attention_with_lse):
        with pytest.raises(ConfigError, match=r"attention: clamp=.* is not a finite number.*Use 5"):
            call(ONES, ONES, ONES, scale=1.0, clamp=clamp)


def test_value_gates_are_floating_point(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DTypeError, match="attention: value_gate is int32"):
        attention(ONES, ONES, ONES, scale=1.0, value_gate=shaped(2, 3, 2, dtype=jnp.int32))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_what_clamp_and_value_gate_leave_alone(implementation: Any):
    @jax.jit
    def read(q: jax.Array, shut: jax.Array, half: jax.Array) -> list[Any]:
        call = functools.partial(
            attention_with_lse, q, q, q, scale=0.5, implementation=implementation
        )
        return [call(), call(clamp=1e3), call(value_gate=shut), call(value_gate=half)]

    gates = (np.full((2, 3, 2), value, np.float32) for value in (0.0, 0.5))
    (y, lse), (high, high_lse), (shut, shut_lse), (half, _) = read(Q, *gates)
    np.testing.assert_allclose(high, y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high_lse, lse, rtol=1e-6)
    # The softmax does not see the gates.
    np.testing.assert_array_equal(shut, 0.0)
    np.testing.assert_array_equal(shut_lse, lse)
    np.testing.assert_array_equal(half, np.float32(0.5) * y)


def test_below_the_clamp_all_keys_weigh_the_same():
    # With every logit clamped, the read is the mean of what is visible, whatever the queries are.
    read = jax.jit(lambda q, v: attention(q, q, v, scale=1.0, clamp=-1.0))
    mean = np.cumsum(Q, axis=1) / np.arange(1, 4)[:, None, None]
    np.testing.assert_allclose(read(np.abs(Q), Q), mean, rtol=1e-5, atol=1e-6)


def test_names_of_implementations(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KernelUnsupported, match="attention cannot run implementation 'cudnn'"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="cudnn")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UnknownName, match=r"Unknown implementation 'xlaa'\. Did you mean xla"):
        attention(ONES, ONES, ONES, scale=1.0, implementation="xlaa")


def test_auto_on_a_cpu_says_what_it_takes():
    choice = explain("attention", *(shaped(*ONES.shape),) * 3, scale=1.0)
    assert choice.implementation == "xla"
    assert [r.implementation for r in choice.rejected] == ["cudnn", "pallas"]
    half = shaped(*ONES.shape, dtype=jnp.bfloat16)
    with pytest.raises(KernelUnsupported, match="no CUDA GPU here"):
        explain("attention", half, half, half, implementation="cudnn")


def test_few_queries_take_no_kernel_on_a_gpu():
    def chosen(length: int, **options: Any) -> str:
        arrays = [shaped(2, length, 2, 16)] * 3
        with stand_in_gpu():
            return explain("attention", *arrays, **options).implementation

    assert [chosen(16), chosen(17)] == ["xla", "pallas"]
    assert chosen(16, implementation="pallas") == "pallas"


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas", "auto"])
def test_nothing_to_read(implementation: Any):
    """Rows, queries and keys may be none; where no key is, the result is 0."""
    options: dict[str, Any] = {"implementation": implementation, "causal": False}
    sizes = ((0, 3, 3), (2, 0, 3), (2, 3, 0))

    def read(q: jax.Array, k: jax.Array) -> Any:
        grad = jax.grad(lambda q: jnp.sum(attention(q, k, k, **options)))
        return attention_with_lse(q, k, k, **options), grad(q)

    pairs = [[np.ones((b, n, 2, 4), np.float32) for n in (t, s)] for b, t, s in sizes]
    found = jax.jit(lambda pairs: [read(*pair) for pair in pairs])(pairs)
    for ((y, lse), grad), (batch, queries, _) in zip(found, sizes, strict=True):
        np.testing.assert_array_equal(y, np.zeros((batch, queries, 2, 4)))
        np.testing.assert_array_equal(lse, np.full((batch, queries, 2), -np.inf))
        np.testing.assert_array_equal(grad, np.zeros((batch, queries, 2, 4)))


@pytest.mark.parametrize(
    "options",
    [{"lag": 1}, {"window": 3}, {"log_forget": jnp.asarray(np.zeros((2, 3, 2), np.float32))}],
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
    x = np.ones(ONES.shape)  # float64, which must not warn
    scales = (None, np.float32(0.5), np.float64(0.5), np.full(2, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The arrays are constants of the program, which the op itself converts.
        expected, *found = jax.jit(
            lambda q: (
                [attention(q, q, q, scale=0.5)]
                + [attention(x, x, x, scale=scale) for scale in scales]
            )
        )(ONES)
    for y in found:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_padding_between_tokens_counts_neither_in_distances_nor_with_its_gates(
    implementation: Any,
):
    draw = np.random.default_rng(3)
    x = draw.normal(size=(1, 9, 1, 4)).astype(np.float32)
    gates = -np.log1p(np.exp(draw.normal(size=(1, 9, 1)))).astype(np.float32)
    ids = np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1]], np.int32)
    real = np.flatnonzero(ids[0])

    @jax.jit
    def read(x: jax.Array, gates: jax.Array, ids: jax.Array | None) -> jax.Array:
        rule = {"scale": 1.0, "lag": 2, "window": 4, "implementation": implementation}
        return attention(x, x, x, segment_ids=ids, log_forget=gates, **rule)

    padded, alone = read(x, gates, ids), read(x[:, real], gates[:, real], None)
    np.testing.assert_allclose(padded[:, real], alone, rtol=1e-6, atol=1e-6)
