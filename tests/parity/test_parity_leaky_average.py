"""The two forms of the leaky average against its closed form and its adjoint in float64.

A form is compiled once for each scaling and set of shapes: all else, documents too, is data.
"""

import functools
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
    Documents,
    direct,
    documents_at,
    exact,
    first_documents,
    inputs,
    state_of,
    waves,
    weights_of,
    with_gradients,
)

FORMS: dict[str, dict[str, Any]] = {
    "chunks": {"implementation": "xla", "chunk_size": CHUNK},
    "reference": {"implementation": "reference"},
}
RATES = np.array([0.02, 0.7, 4.0], np.float32)
HISTORIES = {
    "first document": first_documents(IDS),
    "continued": np.array([1, 5, 1, 1, 1, 4], np.int32),
    "another": np.array([9, 2, 2, 3, 3, 9], np.int32),
    "none": np.zeros(len(IDS), np.int32),
}


@functools.cache
def compiled(form: str, scaling: str) -> Callable[..., Any]:
    return with_gradients(scaling=scaling, **FORMS[form])


def check(run: Any, x: Any, rate: Any, state: Any, documents: Any, scaling: str) -> Any:
    """Compare outputs and gradients with exact ones."""
    weights = weights_of(x, state)
    found = run(x, rate, state, documents, weights)
    expected = exact(x, rate, state, weights, scaling=scaling, documents=documents)
    assert_close(found[0], expected[0], FORWARD)
    assert_close(found[1], expected[1], GRADIENT)
    return found


# The scaling is applied to sums of any length alike.
@pytest.mark.parametrize(
    ("form", "length", "scaling"),
    [
        ("chunks", 1, "normalised"),
        ("chunks", 2, "sum"),
        ("chunks", 15, "scaled"),
        ("chunks", 16, "normalised"),
        ("chunks", 17, "scaled"),
        ("chunks", 53, "sum"),
        ("reference", 1, "scaled"),
        ("reference", 53, "sum"),
    ],
)
def test_lengths(form: str, length: int, scaling: str):
    x, start, weight = inputs(2, length)
    check(compiled(form, scaling), x, RATES, state_of(start, weight, scaling), None, scaling)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
@pytest.mark.parametrize("history", HISTORIES)
def test_segments(history: str, scaling: str, form: str):
    x, start, weight = inputs(len(IDS), LENGTH)
    documents, state = Documents(IDS, HISTORIES[history]), state_of(start, weight, scaling)
    found = check(compiled(form, scaling), x, RATES, state, documents, scaling)
    (y, after), (x_grad, _, state_grad) = found
    np.testing.assert_array_equal(y[IDS == 0], 0.0)
    np.testing.assert_array_equal(x_grad[IDS == 0], 0.0)
    np.testing.assert_array_equal(after.total[-1], start[-1])  # the row of padding
    used = np.any(np.asarray(state_grad.total[:-1]) != 0.0)
    assert used == (history in ("first document", "continued"))


@pytest.mark.parametrize("size", [1, 5, 64])
def test_chunk_size_changes_nothing(size: int):
    x, start, _ = inputs(len(IDS), LENGTH)
    run = with_gradients(implementation="xla", chunk_size=size)
    documents = Documents(IDS, HISTORIES["first document"])
    check(run, x, RATES, LeakyState(start, None), documents, "sum")


@pytest.mark.parametrize("cut", [1, 5, 14, 16, 21])
@pytest.mark.parametrize("scaling", ["sum", "normalised"])
@pytest.mark.parametrize("form", FORMS)
def test_split_equals_whole(form: str, scaling: str, cut: int):
    """Each part is padding in the call of the other; the state and its gradient are handed on."""
    x, start, weight = inputs(len(IDS), LENGTH)
    state, initial = state_of(start, weight, scaling), HISTORIES["continued"]
    run, weights = compiled(form, scaling), weights_of(x, state)
    whole, grads = run(x, RATES, state, Documents(IDS, initial), weights)
    early, late = documents_at(cut, initial)
    head, _ = run(x, RATES, state, early, weights)
    tail, (late_x, late_rate, between) = run(x, RATES, head.state, late, weights)
    _, (early_x, early_rate, by_state) = run(
        x, RATES, state, early, LeakyOutput(weights.y, between)
    )
    assert_close(LeakyOutput(head.y + tail.y, tail.state), whole, FORWARD)
    assert_close((early_x + late_x, early_rate + late_rate, by_state), grads, GRADIENT)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_rates(form: str):
    x, start, _ = inputs(2, 53)
    state = LeakyState(start, None)
    weights = LeakyOutput(waves(x), LeakyState(np.zeros_like(start), None))
    for rates in ([0.0, 1e-4, 1.0], [80.0, 1e3, 3e38], [np.inf, 0.0, np.inf]):
        rate = np.array(rates, np.float32)
        out, grads = compiled(form, "sum")(x, rate, state, None, weights)
        expected, expected_grads = exact(x, rate, state, weights)
        assert_close(out, expected, FORWARD)
        (x_grad, rate_grad, state_grad), (by_x, by_rate, by_state) = grads, expected_grads
        assert_close((x_grad, state_grad), (by_x, by_state), GRADIENT)
        # Per head, for they differ by many orders of magnitude; e^-1000 is 0 in float64 as well.
        np.testing.assert_allclose(rate_grad, by_rate, rtol=5e-5, atol=1e-30)
        np.testing.assert_array_equal(np.asarray(rate_grad)[rate >= 1e3], 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
def test_an_infinite_rate_forgets_all_in_one_step(scaling: str, form: str):
    x, start, weight = inputs(len(IDS), LENGTH)
    state, one = state_of(start, weight, scaling), np.ones_like(IDS)
    run, rate = compiled(form, scaling), np.full(3, np.inf, np.float32)
    (y, _), (_, slope, _) = run(x, rate, state, Documents(one, one[:, 0]), weights_of(x, state))
    np.testing.assert_allclose(y, x, rtol=1e-6)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
def test_decay_gradient_is_the_numerical_derivative(scaling: str):
    """Negative parameters too: the gradient then has the other sign."""
    x, start, weight = inputs(2, 21)
    ids, initial = IDS[2:4, :21], np.array([1, 9], np.int32)
    beta = np.array([0.03, -0.03, -0.4])
    wide = [a.astype(np.float64) for a in (x, start, weight)]

    def scalar(beta: Any, x: Any, total: Any, weight: Any, ids: Any, initial: Any) -> Any:
        y, after = leaky_average(
            x,
            decay_rate(beta),
            scaling=scaling,
            initial_state=state_of(total, weight, scaling),
            segment_ids=ids,
            initial_segment=initial,
            chunk_size=8,
            implementation="xla",
        )
        return jnp.sum(y * waves(y)) + jnp.sum(after.total * waves(after.total))

    def formula(beta: np.ndarray) -> float:
        out = direct(x, np.abs(10 * beta), start, weight, scaling=scaling, ids=ids, initial=initial)
        return sum(float(np.sum(a * waves(a))) for a in out[:2])

    step = 1e-6
    slopes = [
        (formula(beta + step * unit) - formula(beta - step * unit)) / (2 * step)
        for unit in np.eye(3)
    ]
    with jax.enable_x64(True):
        grad = np.asarray(jax.jit(jax.grad(scalar))(beta, *wide, ids, initial))
    assert grad.dtype == np.float64
    assert rms_error(grad, np.array(slopes)) < 1e-8  # measured 1e-9


@pytest.mark.parametrize("form", [*FORMS, "pallas"])
def test_half_precision_inputs_keep_a_float32_sum_and_rate(form: str):
    options = FORMS.get(form, {"implementation": "pallas"})
    run = jax.jit(lambda x, rate, state: leaky_average(x, rate, initial_state=state, **options))
    empty = LeakyState(np.zeros((1, 1, 1), np.float32), None)
    # 1.0078125 is a bfloat16, its multiples beyond 2 mostly are not: 64 of them make 64.5 exactly,
    # where a bfloat16 sum would stop growing by the fraction.
    x = np.full((1, 64, 1, 1), 1.0078125, jnp.bfloat16)
    first = np.arange(64)[:, None, None] < 33
    rate = np.zeros(1, np.float32)
    head = run(np.where(first, x, 0), rate, empty)
    for y, state in (run(x, rate, empty), run(np.where(first, 0, x), rate, head.state)):
        assert y.dtype == jnp.bfloat16
        assert state.total.dtype == jnp.float32
        assert float(state.total[0, 0, 0]) == 64.5
    rate = np.array([0.3], np.float32)  # 0.30078125 as a bfloat16
    wide = np.float32(x)
    expected = direct(wide, rate, empty.total, empty.total)
    assert_close(run(x, rate, empty).state.total, expected.total, FORWARD)
