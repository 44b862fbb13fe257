"""Normalisations where they are singular, and the gradients written by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.ops.norms import at_least_float32, clamped_exp, l2_normalise, layer_norm, rms_norm
from tests.helpers.compare import FORWARD, GRADIENT, assert_close
from tests.helpers.derivatives import derivatives


def draw(*shapes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    return tuple(generator.normal(size=shape).astype(np.float32) for shape in shapes)


def test_l2_normalise_at_and_near_zero():
    x = np.float32([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0], [3e-9, 4e-9], [3e9, 4e9]])
    y = [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]
    found, pull = jax.vjp(jax.jit(l2_normalise), x)
    np.testing.assert_allclose(found, y, rtol=1e-6)
    (grad,) = pull(np.broadcast_to(np.float32([1.0, -1.0]), x.shape))
    # (g - y <g, y>) / |x| with g = (1, -1)
    expected = [[0.224, -0.168], [0.0, 0.0], [0.0, 0.0], [2.24e8, -1.68e8], [2.24e-10, -1.68e-10]]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_l2_normalise_computes_in_float32():
    (x,) = draw((4, 64))
    run, half = jax.jit(l2_normalise), x.astype(jnp.bfloat16)
    y = run(half)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(run(half.astype(np.float32)))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm_and_its_gradient(use_bias: bool):
    x, weight, bias = draw((3, 8), (8,), (8,))
    x = 3 * x + 1
    x[0] = 2.0  # one row has no variance

    def formula(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        y = (x - mean) / jnp.sqrt(variance + 1e-5) * weight
        return y + bias if use_bias else y

    def ours(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return layer_norm(x, weight, bias if use_bias else None)

    def run(function, *args):
        scalar = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return function(*args), jax.grad(scalar, argnums=(0, 1, 2))(*args)

    y, grads = jax.jit(lambda *a: run(ours, *a))(x, weight, bias)
    expected_y, expected_grads = jax.jit(lambda *a: run(formula, *a))(x, weight, bias)
    assert_close(y, expected_y, FORWARD)
    # The row without variance divides by sqrt(1e-5); its gradient is 300 times the others'.
    assert_close(grads, expected_grads, GRADIENT)


def test_clamped_exp_and_its_gradient():
    limit = math.log(65535)
    log_scale = np.float32([-0.1, 0.1, 1.0, 1.2, 50.0])
    scale, pull = jax.vjp(jax.jit(lambda s: clamped_exp(s, 1, limit)), log_scale)
    np.testing.assert_allclose(scale, [math.exp(-1), math.e, math.exp(10), 65535, 65535], rtol=1e-5)
    grad = np.asarray(pull(np.ones_like(log_scale))[0])
    np.testing.assert_allclose(grad[:3], 10 * np.asarray(scale)[:3], rtol=1e-5)
    np.testing.assert_array_equal(grad[3:], 0.0)


def test_clamped_exp_clamps_after_the_power():
    limit = math.log(65535)
    scale = jax.jit(lambda s: clamped_exp(s, 2, limit))(np.float32([0.1, 0.9]))
    np.testing.assert_allclose(scale, [math.exp(2), 65535], rtol=1e-5)


def test_at_least_float32():
    def dtype(given: Any) -> Any:
        return jax.eval_shape(at_least_float32, np.ones(1, given)).dtype

    assert dtype(jnp.bfloat16) == jnp.float32
    with jax.enable_x64(True):
        assert dtype(np.float64) == jnp.float64


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_rms_norm_and_its_gradient(weighted: bool, eps: float):
    x, weight = draw((3, 8), (8,))
    x = 3 * x + 1
    x[0] = 0.0

    def formula(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) / 8 + eps)
        return y * weight if weighted else y

    def ours(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight if weighted else None, eps=eps)

    def run(function, *args):
        scalar = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return function(*args), jax.grad(scalar, argnums=(0, 1))(*args)

    y, grads = jax.jit(lambda *a: run(ours, *a))(x, weight)
    expected_y, expected_grads = jax.jit(lambda *a: run(formula, *a))(x, weight)
    assert_close(y, expected_y, FORWARD)
    assert_close(grads, expected_grads, GRADIENT)
    np.testing.assert_array_equal(np.asarray(y)[0], 0.0)
    zeros = (weight if weighted else np.ones(8)) / math.sqrt(eps)  # cos(0) · weight / sqrt(eps)
    np.testing.assert_allclose(np.asarray(grads[0])[0], zeros, rtol=1e-5)


def test_rms_norm_rounds_once():
    (x,) = draw((4, 64))
    run, half = jax.jit(rms_norm), x.astype(jnp.bfloat16)
    weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    y = run(half, weight)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(run(half.astype(np.float32), weight))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def test_every_derivative_of_norms():
    x, weight, bias = draw((3, 8), (8,), (8,))
    x = 3 * x + 1

    def layer_formula(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        variance = jnp.var(x, -1, keepdims=True)
        return (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(variance + 1e-5) * weight + bias

    pairs = [
        (layer_norm, layer_formula, (x, weight, bias)),
        (
            rms_norm,
            lambda x, w: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * w,
            (x, weight),
        ),
        (l2_normalise, lambda x: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)), (x,)),
    ]
    for ours, formula, args in pairs:
        run = jax.jit(lambda *a, pair=(ours, formula): [derivatives(f, *a) for f in pair])
        found, expected = run(*args)
        assert_close(found, expected, GRADIENT)


def test_the_gradient_of_layer_norm_is_added_to_the_stream_at_once():
    """Separate terms of it would be summed late, for all layers together."""

    def pull(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: x + layer_norm(x, jnp.ones(8), None), x)[1](g)[0]

    x = np.ones((3, 8), np.float32)
    names = [equation.primitive.name for equation in jax.make_jaxpr(pull)(x, x).jaxpr.eqns]
    assert names.count("add_any") == 1


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_norms_of_nothing(shape: tuple[int, ...]):
    @jax.jit
    def run(x: jax.Array, ones: jax.Array) -> Any:
        return layer_norm(x, ones, ones), rms_norm(x, ones), l2_normalise(x)

    for y in run(np.zeros(shape, np.float32), np.ones(8, np.float32)):
        assert y.shape == shape


def test_norms_of_numpy_arrays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x, weight = np.random.default_rng(0).normal(size=(3, 8)), np.ones(8)
    # Constants of a program, which the functions themselves convert.
    for y in jax.eval_shape(
        lambda: (layer_norm(x, weight, weight), rms_norm(x, weight), l2_normalise(x))
    ):
        assert y.dtype == jnp.float32
