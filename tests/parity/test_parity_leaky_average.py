"""The two forms of the leaky average against each other and against its closed form in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops.leaky_average import LeakyOutput, LeakyState, decay_rate, leaky_average
from tests.helpers.compare import FORWARD, GRADIENT, assert_close, rms_error
from tests.helpers.leaky_average import (
    CHUNK,
    IDS,
    LENGTH,
    Direct,
    direct,
    functional,
    inputs,
    state_of,
)

SCALINGS = ("sum", "scaled", "normalised")
FORMS = ("xla", "reference")
RATES = np.array([0.02, 0.7, 4.0], np.float32)


def value_and_grads(scaling: str, **options: Any) -> Callable[..., Any]:
    """Compile outputs and gradients by x, rate and initial state, of each form."""

    def run(form: str, x: jax.Array, rate: jax.Array, state: LeakyState) -> Any:
        def scalar(x: jax.Array, rate: jax.Array, state: LeakyState) -> tuple[jax.Array, Any]:
            y, after = leaky_average(
                x,
                rate,
                scaling=scaling,
                initial_state=state,
                chunk_size=CHUNK,
                implementation=form,
                **options,
            )
            parts = [functional(leaf) for leaf in jax.tree.leaves((y, after))]
            return sum(parts), (y, after)

        return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(x, rate, state)

    return jax.jit(lambda *args: {form: run(form, *args) for form in FORMS})


def check(results: Any, expected: Direct, scaling: str) -> None:
    """Compare both forms with the closed form, and their gradients with each other."""
    wanted = (expected.y, state_of(expected.total, expected.weight, scaling))
    for form in FORMS:
        (_, out), _ = results[form]
        assert_close(out, wanted, FORWARD)
    assert_close(results["xla"][1], results["reference"][1], GRADIENT)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 53])
def test_lengths(length: int, scaling: str):
    x, start, weight = inputs(2, length)
    results = value_and_grads(scaling)(x, RATES, state_of(start, weight, scaling))
    check(results, direct(x, RATES, start, weight, scaling=scaling), scaling)


@pytest.mark.parametrize(
    ("history", "scaling"),
    [
        *itertools.product(["first document", "continued", "another"], ["sum", "normalised"]),
        ("another", "scaled"),
        ("none", "sum"),
    ],
)
def test_segments(history: str, scaling: str):
    x, start, weight = inputs(len(IDS), LENGTH)
    initial = {
        "first document": None,
        "continued": np.array([1, 5, 1, 1, 1, 4], np.int32),
        "another": np.array([9, 2, 2, 3, 3, 9], np.int32),
        "none": np.zeros(len(IDS), np.int32),
    }[history]
    ids = jnp.asarray(IDS)
    given = None if initial is None else jnp.asarray(initial)
    run = value_and_grads(scaling, segment_ids=ids, initial_segment=given)
    results = run(x, RATES, state_of(start, weight, scaling))
    expected = direct(x, RATES, start, weight, scaling=scaling, ids=IDS, initial=initial)
    check(results, expected, scaling)
    for form in FORMS:
        (_, (y, after)), (x_grad, _, state_grad) = results[form]
        np.testing.assert_array_equal(y[IDS == 0], 0.0)
        np.testing.assert_array_equal(x_grad[IDS == 0], 0.0)
        np.testing.assert_array_equal(after.total[-1], start[-1])  # the row of padding
        used = np.any(np.asarray(state_grad.total[:-1]) != 0.0)
        assert used == (history in ("first document", "continued"))


def test_chunk_size_changes_nothing():
    x, start, _ = inputs(len(IDS), LENGTH)
    ids = jnp.asarray(IDS)

    def run(x: jax.Array, rate: jax.Array, chunk: int, packed: bool) -> Any:
        def scalar(x: jax.Array, rate: jax.Array) -> tuple[jax.Array, Any]:
            y, after = leaky_average(
                x,
                rate,
                initial_state=LeakyState(jnp.asarray(start), None),
                segment_ids=ids if packed else None,
                chunk_size=chunk,
                implementation="xla",
            )
            return functional(y), (y, after)

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(x, rate)

    for packed, sizes in ((False, (5, 64)), (True, (1, 5, 64))):
        every = jax.jit(lambda x, r, p=packed, s=sizes: [run(x, r, size, p) for size in s])(
            x, RATES
        )
        (_, first), first_grads = every[0]
        for (_, out), grads in every[1:]:
            assert_close(out, first, FORWARD)
            assert_close(grads, first_grads, GRADIENT)


@pytest.mark.parametrize("scaling", ["sum", "normalised"])
def test_split_equals_whole(scaling: str):
    x, start, weight = inputs(len(IDS), LENGTH)
    ids = jnp.asarray(IDS)
    cuts = (1, 14, 16)
    # Which document each row was in at the cut, as a caller's state would know.
    known = [[next((i for i in row[:c][::-1] if i), 9) for row in IDS] for c in cuts]

    def both(form: str, x: jax.Array, rate: jax.Array, state: LeakyState) -> Any:
        options = {"scaling": scaling, "chunk_size": CHUNK, "implementation": form}
        before = jnp.full(len(IDS), 9)
        whole = leaky_average(
            x, rate, initial_state=state, segment_ids=ids, initial_segment=before, **options
        )
        parts = []
        for cut, at_cut in zip(cuts, known, strict=True):
            head, between = leaky_average(
                x[:, :cut],
                rate,
                initial_state=state,
                segment_ids=ids[:, :cut],
                initial_segment=before,
                **options,
            )
            tail, after = leaky_average(
                x[:, cut:],
                rate,
                initial_state=between,
                segment_ids=ids[:, cut:],
                initial_segment=jnp.asarray(at_cut),
                **options,
            )
            parts.append(LeakyOutput(jnp.concatenate([head, tail], axis=1), after))
        return whole, parts

    args = (x, RATES, state_of(jnp.asarray(start), jnp.asarray(weight), scaling))
    results = jax.jit(lambda *args: [both(form, *args) for form in FORMS])(*args)
    for whole, parts in results:
        for part in parts:
            assert_close(part, whole, FORWARD)


def test_gradient_flows_through_the_state():
    x, start, _ = inputs(2, LENGTH)

    def scalar(x: jax.Array, rate: jax.Array, start: jax.Array, cut: int) -> jax.Array:
        state, parts = LeakyState(start, None), []
        for part in (x[:, :cut], x[:, cut:]) if cut else (x,):
            y, state = leaky_average(
                part, rate, initial_state=state, chunk_size=CHUNK, implementation="xla"
            )
            parts.append(y)
        return functional(jnp.concatenate(parts, axis=1)) + functional(state.total)

    grads = jax.jit(
        lambda *args: [jax.grad(scalar, argnums=(0, 1, 2))(*args, cut) for cut in (0, 5, 21)]
    )(x, RATES, start)
    assert_close(grads[1], grads[0], GRADIENT)
    assert_close(grads[2], grads[0], GRADIENT)


@pytest.mark.parametrize("form", [*FORMS, "pallas"])
def test_extreme_rates(form: str):
    rates = np.array([0.0, 1e-4, 1.0, 80.0, 1e3, 3e38, np.inf], np.float32)
    x, start, _ = inputs(2, LENGTH, heads=len(rates))
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)

    def scalar(x: jax.Array, rate: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, _ = leaky_average(
            x,
            rate,
            initial_state=LeakyState(start, None),
            chunk_size=CHUNK,
            implementation=form,
        )
        return jnp.sum(y * cotangent.astype(np.float32)), y

    grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))
    (_, y), (x_grad, rate_grad, start_grad) = grad(x, rates, start)

    # y_t = Σ_i e^{-r (t-i)} x_i, the state being x at i = -1, so every derivative is a sum too.
    wide = np.concatenate([start[:, None], x], axis=1).astype(np.float64)
    age = np.arange(LENGTH)[:, None] - np.arange(-1, LENGTH)
    r = np.minimum(rates, 1e30).astype(np.float64)[:, None, None]  # 0 · inf would be NaN
    decay = np.where(age >= 0, np.exp(-r * np.maximum(age, 0)), 0.0)  # [H T I]
    by_input = np.einsum("hti,bthk->bihk", decay, cotangent)
    by_rate = -np.einsum("hti,ti,bihk,bthk->h", decay, age.astype(float), wide, cotangent)
    assert_close(y, np.einsum("hti,bihk->bthk", decay, wide), FORWARD)
    assert_close((x_grad, start_grad), (by_input[:, 1:], by_input[:, 0]), GRADIENT)
    assert bool(jnp.all(jnp.isfinite(rate_grad)))
    # Per head, for they differ by many orders of magnitude; e^-1000 is 0 in float64 as well.
    np.testing.assert_allclose(rate_grad, by_rate, rtol=5e-5, atol=1e-30)
    np.testing.assert_array_equal(rate_grad[4:], 0.0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_decay_gradient_is_the_numerical_derivative(scaling: str):
    """Negative parameters too: the gradient then has the other sign."""
    x, start, weight = inputs(2, 21)
    ids, initial = IDS[2:4, :21], np.array([1, 9], np.int32)
    beta = np.array([0.03, -0.03, -0.4])

    def scalar(beta: jax.Array, form: str) -> jax.Array:
        y, after = leaky_average(
            jnp.asarray(x, jnp.float64),
            decay_rate(beta),
            scaling=scaling,
            initial_state=state_of(
                jnp.asarray(start, jnp.float64), jnp.asarray(weight, jnp.float64), scaling
            ),
            segment_ids=jnp.asarray(ids),
            initial_segment=jnp.asarray(initial),
            chunk_size=8,
            implementation=form,
        )
        return functional(y) + functional(after.total)

    def formula(beta: np.ndarray) -> float:
        out = direct(x, np.abs(10 * beta), start, weight, scaling=scaling, ids=ids, initial=initial)
        return sum(float(np.sum(a * np.cos(np.arange(a.size)).reshape(a.shape))) for a in out[:2])

    step = 1e-6
    slopes = [
        (formula(beta + step * unit) - formula(beta - step * unit)) / (2 * step)
        for unit in np.eye(3)
    ]
    with jax.enable_x64(True):
        grads = jax.jit(lambda b: [jax.grad(scalar)(b, form) for form in FORMS])(jnp.asarray(beta))
    for grad in grads:
        assert grad.dtype == np.float64
        assert rms_error(np.asarray(grad), np.array(slopes)) < 1e-8  # measured 1e-9


@pytest.mark.parametrize("form", [*FORMS, "pallas"])
def test_half_precision_inputs_keep_a_float32_sum(form: str):
    # 1.0078125 is a bfloat16, its multiples beyond 2 mostly are not: 64 of them make 64.5 exactly,
    # where a bfloat16 sum would stop growing by the fraction.
    x = jnp.full((1, 64, 1, 1), 1.0078125, jnp.bfloat16)

    @jax.jit
    def run(x: jax.Array) -> Any:
        whole = leaky_average(x, jnp.zeros(1), chunk_size=CHUNK, implementation=form)
        halves = leaky_average(x[:, :33], jnp.zeros(1), implementation=form)[1]
        return whole, leaky_average(
            x[:, 33:], jnp.zeros(1), initial_state=halves, implementation=form
        )

    for y, state in run(x):
        assert y.dtype == jnp.bfloat16
        assert state.total.dtype == jnp.float32
        assert float(state.total[0, 0, 0]) == 64.5


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs_keep_a_float32_rate(form: str):
    x = jax.random.normal(jax.random.key(0), (1, 17, 1, 2)).astype(jnp.bfloat16)
    rate = jnp.array([0.3])  # 0.30078125 as a bfloat16

    @jax.jit
    def run(x: jax.Array) -> Any:
        wide = x.astype(jnp.float32)
        return [leaky_average(a, rate, implementation=form)[1] for a in (x, wide)]

    narrow, wide = run(x)
    assert_close(narrow, wide, FORWARD)
