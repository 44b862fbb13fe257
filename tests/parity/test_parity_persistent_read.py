"""The two forms of the persistent read against each other and against loops in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops.attention import Dropout
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.persistent_read import persistent_read
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close

FORMS = ("xla", "reference")
BATCH, LENGTH, HEADS, PAIRS, WIDTH, VALUE_WIDTH = 3, 5, 3, 7, 5, 4


class Inputs(NamedTuple):
    q: jax.Array
    keys: jax.Array
    values: jax.Array
    scale: jax.Array


def inputs(banks: int) -> Inputs:
    shapes = (
        (BATCH, LENGTH, HEADS, WIDTH),
        (banks, HEADS, PAIRS, WIDTH),
        (banks, HEADS, PAIRS, VALUE_WIDTH),
    )
    arrays = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]
    return Inputs(*arrays, scale=jnp.array([0.5, 1.0, 3.0]))


def direct(args: Inputs) -> np.ndarray:
    q, keys, values, scale = (np.asarray(a, np.float64) for a in args)
    logits = np.einsum("h,bthk,rhpk->rbthp", scale, q, keys)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("rbthp,rhpv->bthv", weights, values) / len(keys)


def value_and_grads(args: Inputs, **options: Any) -> dict[str, Any]:
    def run(form: str, args: Inputs) -> Any:
        def scalar(args: Inputs) -> tuple[jax.Array, jax.Array]:
            q, keys, values, scale = args
            y = persistent_read(q, keys, values, scale=scale, implementation=form, **options)
            wide = at_least_float32(y)
            return jnp.sum(wide * jnp.cos(jnp.arange(y.size, dtype=wide.dtype)).reshape(y.shape)), y

        (_, y), grads = jax.value_and_grad(scalar, has_aux=True)(args)
        return y, grads

    return jax.jit(lambda args: {form: run(form, args) for form in FORMS})(args)


@pytest.mark.parametrize("banks", [1, 3])
def test_banks(banks: int):
    args = inputs(banks)
    results = value_and_grads(args)
    for form in FORMS:
        assert_close(results[form][0], direct(args), FORWARD)
    assert_close(results["xla"][1], results["reference"][1], GRADIENT)


@pytest.mark.parametrize("banks", [1, 3])
def test_dropout_is_one_mask_for_both_forms(banks: int):
    args = inputs(banks)
    results = value_and_grads(args, dropout=Dropout(0.4, jax.random.key(5)))
    assert_close(results["xla"][0], results["reference"][0], FORWARD)
    assert_close(results["xla"][1], results["reference"][1], GRADIENT)
    assert float(np.max(np.abs(results["xla"][0] - direct(args)))) > 0.1


def test_half_precision_values():
    args = inputs(3)
    args = args._replace(values=args.values.astype(jnp.bfloat16))
    results = value_and_grads(args)
    for form in FORMS:
        y, grads = results[form]
        assert y.dtype == jnp.bfloat16
        assert grads.values.dtype == jnp.bfloat16
        assert grads.q.dtype == grads.keys.dtype == grads.scale.dtype == jnp.float32
        assert_close(y, direct(args), BFLOAT16)
    assert_close(results["xla"][1], results["reference"][1], BFLOAT16)


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_ten_thousand(form: str):
    args = inputs(1)._replace(scale=jnp.full(HEADS, 1e4))
    y, grads = value_and_grads(args)[form]
    assert_close(y, direct(args), FORWARD)
    for leaf in jax.tree.leaves(grads):
        assert bool(jnp.all(jnp.isfinite(leaf)))


def test_gradients_are_the_numerical_derivatives():
    """One random direction per input, in float64."""
    with jax.enable_x64(True):
        args = Inputs(*(jnp.asarray(a, jnp.float64) for a in inputs(3)))
        results = value_and_grads(args)
    cotangent = np.cos(np.arange(BATCH * LENGTH * HEADS * VALUE_WIDTH)).reshape(
        results["xla"][0].shape
    )
    draw, step = np.random.default_rng(0), 1e-6
    for field in Inputs._fields:
        value = np.asarray(getattr(args, field))
        along = draw.normal(size=value.shape)
        ahead, behind = (
            np.sum(cotangent * direct(args._replace(**{field: value + sign * step * along})))
            for sign in (1, -1)
        )
        for form in FORMS:
            slope = float(np.sum(along * np.asarray(getattr(results[form][1], field))))
            assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)
