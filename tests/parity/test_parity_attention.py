"""The two forms of attention against each other and against loops in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops.attention import Dropout, Places, attention
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close

FORMS = ("xla", "reference")
BATCH, HEADS, WIDTH, VALUE_WIDTH = 3, 2, 5, 3
SCALE = np.array([0.7, 2.0], np.float32)


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    scale: jax.Array


def inputs(queries: int, keys: int) -> Inputs:
    shapes = {
        "q": (BATCH, queries, HEADS, WIDTH),
        "k": (BATCH, keys, HEADS, WIDTH),
        "v": (BATCH, keys, HEADS, VALUE_WIDTH),
    }
    draw = {n: jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(shapes.items())}
    return Inputs(**draw, scale=jnp.asarray(SCALE))


def direct(args: Inputs, visible: np.ndarray) -> np.ndarray:
    """Read for every row, head and query its visible keys only, float64."""
    q, k, v, scale = (np.asarray(a, np.float64) for a in args)
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for row, t, head in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(visible[row, t])
        if seen.size:
            logits = scale[head] * k[row, seen, head] @ q[row, t, head]
            weights = np.exp(logits - logits.max())
            y[row, t, head] = weights @ v[row, seen, head] / weights.sum()
    return y


def value_and_grads(args: Inputs, **options: Any) -> dict[str, Any]:
    """Return outputs and gradients of each form, from one compilation."""

    def run(form: str, args: Inputs) -> Any:
        def scalar(args: Inputs) -> tuple[jax.Array, jax.Array]:
            q, k, v, scale = args
            y = attention(q, k, v, scale=scale, implementation=form, **options)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        (_, y), grads = jax.value_and_grad(scalar, has_aux=True)(args)
        return y, grads

    return jax.jit(lambda args: {form: run(form, args) for form in FORMS})(args)


def check(results: dict[str, Any], expected: np.ndarray) -> None:
    for form in FORMS:
        assert_close(results[form][0], expected, FORWARD)
    assert_close(results["xla"][1], results["reference"][1], GRADIENT)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_lags(lag: int):
    args = inputs(7, 7)
    visible = np.arange(7)[:, None] - np.arange(7) >= lag
    results = value_and_grads(args, lag=lag)
    check(results, direct(args, np.broadcast_to(visible, (BATCH, 7, 7))))
    for y, grads in results.values():
        np.testing.assert_array_equal(y[:, :lag], 0.0)
        np.testing.assert_array_equal(grads.q[:, :lag], 0.0)
        last = 7 - lag  # keys from here on are seen by nobody
        np.testing.assert_array_equal(grads.k[:, last:], 0.0)
        np.testing.assert_array_equal(grads.v[:, last:], 0.0)


@pytest.mark.parametrize("lag", [0, 1])
def test_places_in_a_cache(lag: int):
    """Three queries over nine slots: rows at different lengths, two documents, unused slots."""
    key = np.tile(np.arange(9), (BATCH, 1))
    key_segment = np.array([[1] * 3 + [2] * 4 + [0] * 2, [1] * 9, [0] * 9])
    query = np.array([[4, 5, 6], [6, 7, 8], [0, 1, 2]])
    query_segment = np.array([[2, 2, 2], [1, 0, 1], [1, 1, 1]])
    visible = (
        (key[:, None] + lag <= query[:, :, None])
        & (key_segment[:, None] == query_segment[:, :, None])
        & (key_segment[:, None] != 0)
    )
    args = inputs(3, 9)
    places = Places(*map(jnp.asarray, (query, key, query_segment, key_segment)))
    results = value_and_grads(args, lag=lag, places=places)
    check(results, direct(args, visible))
    for y, grads in results.values():
        np.testing.assert_array_equal(y[~visible.any(2)], 0.0)
        np.testing.assert_array_equal(grads.q[~visible.any(2)], 0.0)
        np.testing.assert_array_equal(grads.v[~visible.any(1)], 0.0)
        np.testing.assert_array_equal(grads.k[2], 0.0)


def test_dropout_is_one_mask_for_both_forms():
    args = inputs(7, 7)
    dropout = Dropout(0.4, jax.random.key(3))
    results = value_and_grads(args, lag=1, dropout=dropout)
    assert_close(results["xla"], results["reference"], GRADIENT)
    plain = value_and_grads(args, lag=1)["xla"][0]
    assert float(jnp.max(jnp.abs(results["xla"][0] - plain))) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_ten_thousand(form: str):
    q, k, v, _ = inputs(6, 6)
    key, query = k / jnp.linalg.norm(k, axis=-1, keepdims=True), q

    def scalar(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> Any:
        y = attention(q, k, v, scale=scale, lag=1, implementation=form)
        return jnp.sum(y * y), y

    grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True))
    (_, y), grads = grad(query, key, v, jnp.full(HEADS, 1e4))
    for leaf in jax.tree.leaves((y, grads)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    # So sharp a softmax returns the value of the nearest key seen.
    logits = np.einsum("bthk,bshk->bhts", query, key)
    logits[:, :, ~np.tri(6, k=-1, dtype=bool)] = -np.inf
    nearest = np.argmax(logits, axis=-1)  # [B H T]
    picked = np.take_along_axis(np.moveaxis(np.asarray(v), 2, 1), nearest[..., None], axis=2)
    assert_close(y[:, 1:], np.moveaxis(picked, 1, 2)[:, 1:], FORWARD)


def test_half_precision_values():
    args = inputs(7, 7)
    rounded = args._replace(v=args.v.astype(jnp.bfloat16))
    expected = direct(rounded, np.broadcast_to(np.tri(7, dtype=bool), (BATCH, 7, 7)))
    for y, _ in value_and_grads(rounded).values():
        assert y.dtype == jnp.bfloat16
        assert_close(y, expected, BFLOAT16)
