"""The forms of attention in plain JAX against formulas in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops import attention_blocked, attention_xla
from jaxmem.ops.attention import Dropout, Places, attention, attention_with_lse
from jaxmem.ops.attention_terms import cumulative
from tests.helpers.attention import (
    Size,
    check,
    direct,
    factors,
    inputs,
    rows_visible,
    run,
    with_whole_dots,
)
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close

SMALL = Size(batch=3, length=7, width=5, value_width=3)


@pytest.fixture(params=["at once", "blocked", "reference"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation to name; `xla` stands for two forms, of short and of long rows."""
    if request.param == "blocked":
        monkeypatch.setattr(attention_xla, "fits_at_once", lambda q, k: False)
        monkeypatch.setattr(attention_blocked, "block_of", lambda length: min(length, 4))
    return "reference" if request.param == "reference" else "xla"


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_lags(form: str, lag: int):
    args = inputs(SMALL)
    found = run(args, lag=lag, implementation=form)
    check(found, direct(args, rows_visible(SMALL, lag=lag)))
    last = SMALL.length - lag  # keys from here on are seen by nobody
    np.testing.assert_array_equal(found[1].k[:, last:], 0.0)
    np.testing.assert_array_equal(found[1].v[:, last:], 0.0)


def test_everything_at_once(form: str):
    """Packed documents with padding, a window, shared keys, gates and dropout."""
    size = Size(batch=2, length=19, heads=4, groups=2, width=6, value_width=5)
    segments = [[1] * 4 + [2] * 7 + [0] * 2 + [3] * 6, [0] * 3 + [7] * 5 + [4] * 11]
    dropout = Dropout(0.3, jax.random.key(5))
    rule = {"lag": 1, "window": 5}
    args = inputs(size, gated=True)
    found = run(
        args, **rule, segment_ids=jnp.asarray(segments), dropout=dropout, implementation=form
    )
    visible = rows_visible(size, segments=segments, **rule)
    check(found, direct(args, visible, factors(size, dropout)))


@pytest.mark.parametrize("lag", [0, 1])
def test_places_in_a_cache(form: str, lag: int):
    """Three queries over nine slots: rows at different lengths, two documents, unused slots."""
    size = Size(batch=3, length=3, keys=9, width=5, value_width=3)
    key = np.tile(np.arange(9), (3, 1))
    key_segment = np.array([[1] * 3 + [2] * 4 + [0] * 2, [1] * 9, [0] * 9])
    query = np.array([[4, 5, 6], [6, 7, 8], [0, 1, 2]])
    query_segment = np.array([[2, 2, 2], [1, 0, 1], [1, 1, 1]])
    visible = (
        (key[:, None] + lag <= query[:, :, None])
        & (key_segment[:, None] == query_segment[:, :, None])
        & (key_segment[:, None] != 0)
    )
    args = inputs(size)
    places = Places(*map(jnp.asarray, (query, key, query_segment, key_segment)))
    found = run(args, lag=lag, places=places, implementation=form)
    check(found, direct(args, visible))
    np.testing.assert_array_equal(found[1].v[~visible.any(1)], 0.0)
    np.testing.assert_array_equal(found[1].k[2], 0.0)


def test_gates_of_a_cache(form: str):
    """The last queries of a row, over a cache of it, are what they are in the row."""
    size = Size(length=9, width=5, value_width=3)
    q, k, v, scale, gates, _ = inputs(size, gated=True)
    index = jnp.broadcast_to(jnp.arange(9), (2, 9))
    places = Places(index[:, 6:], index, jnp.ones((2, 3), jnp.int32), jnp.ones_like(index))
    options = {"scale": scale, "log_forget": gates}
    whole = attention(q, k, v, **options, implementation="reference")
    last = attention(q[:, 6:], k, v, **options, places=places, implementation=form)
    assert_close(last, whole[:, 6:], FORWARD)


def test_extreme_gates(form: str):
    args = inputs(SMALL, gated=True)
    gates = np.asarray(args.log_forget).copy()
    gates[:, 2] = gates[:, 5] = -1e4
    gates[:, 3] = 0.0
    args = args._replace(log_forget=jnp.asarray(gates))
    check(run(args, implementation=form), direct(args, rows_visible(SMALL)))


def test_gradients_of_gates_that_forget_nearly_all(form: str):
    """They are e^-12 of what a token gives itself, whose rounding must not be among them."""
    size = Size(length=19, width=5, value_width=3)
    args = inputs(size)
    gates = -12.0 - jax.random.uniform(jax.random.key(6), (size.batch, size.length, size.heads))
    args = args._replace(scale=0.2 * args.scale, log_forget=gates)
    found, expected = run(args, implementation=form), direct(args, rows_visible(size))
    assert np.max(np.abs(expected[1].log_forget)) < 1e-4
    check(found, expected)


@pytest.mark.parametrize("length", [65, 300])
def test_gates_that_grow(form: str, length: int):
    """Older keys gain up to e^0.3 a token, so that they outweigh near ones by e^45 in the end."""
    size = Size(batch=1, length=length, width=5, value_width=3)
    args = inputs(size)
    gates = 0.3 * jax.random.uniform(jax.random.key(6), (1, length, size.heads))
    args = args._replace(log_forget=gates)
    check(run(args, implementation=form), direct(args, rows_visible(size)))


def test_clamp_and_value_gates_among_all_else(form: str):
    """As `test_everything_at_once`; a quarter of the logits exceed the clamp."""
    size = Size(batch=2, length=19, heads=4, groups=2, width=6, value_width=5)
    segments = [[1] * 4 + [2] * 7 + [0] * 2 + [3] * 6, [0] * 3 + [7] * 5 + [4] * 11]
    dropout = Dropout(0.3, jax.random.key(5))
    rule = {"lag": 1, "window": 5}
    args = inputs(size, gated=True, value_gated=True)
    options = {"segment_ids": jnp.asarray(segments), "dropout": dropout, "clamp": 0.9, **rule}
    visible = rows_visible(size, segments=segments, **rule)
    expected = direct(args, visible, factors(size, dropout), clamp=0.9)
    check(run(args, **options, implementation=form), expected)


@pytest.mark.parametrize("clamp", [-0.3, 0.9])
def test_a_clamp_alone(form: str, clamp: float):
    args = inputs(SMALL)
    found = run(args, lag=1, clamp=clamp, implementation=form)
    check(found, direct(args, rows_visible(SMALL, lag=1), clamp=clamp))


def test_value_gates_alone(form: str):
    args = inputs(SMALL, value_gated=True)
    found = run(args, lag=1, implementation=form)
    check(found, direct(args, rows_visible(SMALL, lag=1)))
    np.testing.assert_array_equal(found[1].value_gate[:, -1], 0.0)  # nobody sees the last key


@pytest.mark.parametrize(
    ("scale", "clamp", "gradient"),
    [
        (5 / 16, 3 * 5 / 16, GRADIENT),
        (64.0, 5.0, GRADIENT),
        # A float32 of 640, as the log-sum-exp is here, is known to 3e-5; 6e-5 measured.
        (64.0, 640.0, Budget(rtol=2e-4, atol=2e-4, rms=2e-4)),
    ],
    ids=["at", "beyond", "clamp-640"],
)
def test_logits_at_the_clamp_and_far_beyond(
    form: str, scale: float, clamp: float, gradient: Budget
):
    """Logits that equal the clamp pass their gradient; they may reach 1e3."""
    size = Size(length=9, heads=4, groups=2, width=5, value_width=3)
    args = with_whole_dots(inputs(size, value_gated=True), scale)
    visible = rows_visible(size, lag=1)
    logits = scale * np.einsum("bthk,bshk->bhts", args.q, np.repeat(args.k, 2, axis=2))
    at_clamp = visible[:, None] & (logits == clamp)
    assert np.any(at_clamp) == (clamp % scale == 0.0)
    found = run(args, lag=1, clamp=clamp, implementation=form)
    expected = direct(args, visible, clamp=clamp)
    check(found, expected, gradient=gradient)


def test_gates_of_a_long_row_keep_their_digits():
    gates = -jax.random.uniform(jax.random.key(0), (1, 20_000, 1))
    whole, rest = (np.asarray(a, np.float64) for a in cumulative(gates))
    exact = np.cumsum(np.asarray(gates, np.float64), axis=1)
    assert np.max(np.abs(whole + rest - exact)) < 1e-5  # of sums up to 1e4
    assert np.max(np.abs(np.asarray(jnp.cumsum(gates, axis=1)) - exact)) > 1e-3


@pytest.mark.parametrize("heads", [1, 4])
def test_reads_of_two_halves_merge(heads: int):
    size = Size(length=9, heads=heads, groups=1, width=5, value_width=3)
    q, k, v, scale, *_ = inputs(size)
    ones = jnp.ones((2, 9), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(9), (2, 9))

    def read(low: int, high: int) -> tuple[jax.Array, jax.Array]:
        part = index[:, low:high]
        places = Places(index, part, ones, jnp.ones_like(part))
        return attention_with_lse(
            q, k[:, low:high], v[:, low:high], scale=scale, places=places, implementation="xla"
        )

    (first, first_lse), (second, second_lse) = read(0, 4), read(4, 9)
    lse = jnp.logaddexp(first_lse, second_lse)
    share = [jnp.exp(part - lse)[..., None] for part in (first_lse, second_lse)]
    whole, whole_lse = attention_with_lse(q, k, v, scale=scale, implementation="xla")
    assert_close((first * share[0] + second * share[1], lse), (whole, whole_lse), FORWARD)


def test_logits_of_ten_thousand(form: str):
    q, k, v, *_ = inputs(Size(length=6, width=5, value_width=3))
    key, query = k / jnp.linalg.norm(k, axis=-1, keepdims=True), q

    def scalar(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> Any:
        y = attention(q, k, v, scale=scale, lag=1, implementation=form)
        return jnp.sum(y * y), y

    grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True))
    (_, y), grads = grad(query, key, v, jnp.full(2, 1e4))
    for leaf in jax.tree.leaves((y, grads)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    # So sharp a softmax returns the value of the nearest key seen.
    logits = np.einsum("bthk,bshk->bhts", query, key)
    logits[:, :, ~np.tri(6, k=-1, dtype=bool)] = -np.inf
    nearest = np.argmax(logits, axis=-1)  # [B H T]
    picked = np.take_along_axis(np.moveaxis(np.asarray(v), 2, 1), nearest[..., None], axis=2)
    assert_close(y[:, 1:], np.moveaxis(picked, 1, 2)[:, 1:], FORWARD)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision_values(form: str, dtype: Any):
    args = inputs(SMALL, dtypes=(dtype, jnp.bfloat16))
    outputs, grads = run(args, implementation=form)
    assert (outputs.y.dtype, outputs.lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in grads[:3]] == [dtype, dtype, jnp.bfloat16]
    expected = direct(args, rows_visible(SMALL))
    check((outputs, grads), expected, BFLOAT16, Budget(rtol=5e-2, atol=5e-2, rms=2e-2))


@pytest.mark.parametrize("clamp", [None, 0.1])
def test_second_derivatives(form: str, clamp: float | None):
    size = Size(batch=1, length=6, heads=1, groups=1, width=3, value_width=3)
    q, k, v, scale, gates, value_gate = inputs(size, gated=True, value_gated=clamp is not None)
    options = {"log_forget": gates, "value_gate": value_gate, "clamp": clamp, "lag": 1}

    def second(form: str) -> jax.Array:
        def loss(q: jax.Array) -> jax.Array:
            y = attention(q, k, v, scale=scale, implementation=form, **options)
            return jnp.sum(jnp.sin(y))

        return jax.grad(lambda q: jnp.sum(jnp.cos(jax.grad(loss)(q))))(q)

    assert_close(jax.jit(second, static_argnums=0)(form), second("reference"), GRADIENT)


def test_long_rows_never_hold_all_weights():
    """The program of a long row has no array of (T, S); neither has its gradient."""
    arrays = [jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32)] * 3

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attention(*arrays, scale=1.0, implementation="xla"))

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).as_text()
    assert "1024x1024" not in text
    assert "128x128" in text
