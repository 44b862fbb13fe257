"""What a leaky average promises beside its numbers: state, parameter, errors."""

import functools

import jax
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ShapeError, UnknownName
from jaxmem.ops.leaky_average import (
    LeakyOutput,
    LeakyState,
    decay_rate,
    init_leaky_state,
    leaky_average,
)

X = np.random.default_rng(0).normal(size=(2, 5, 2, 3)).astype(np.float32)


def test_decay_rate_and_its_gradient():
    beta = np.array([-0.3, 0.0, 0.05], np.float32)
    rate, pull = jax.vjp(jax.jit(decay_rate), beta)
    (grad,) = pull(np.ones_like(beta))
    np.testing.assert_allclose(rate, [3.0, 0.0, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(grad, [-10.0, 0.0, 10.0])


def run(scaling: str, state: LeakyState | None, x: np.ndarray, rate: list[float]) -> LeakyOutput:
    """Average by the definition."""
    call = functools.partial(leaky_average, scaling=scaling, implementation="reference")
    return jax.jit(lambda x, rate, s: call(x, rate, initial_state=s))(x, np.float32(rate), state)


@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
def test_state_has_a_weight_only_where_it_is_needed(scaling: str):
    fresh = init_leaky_state(2, 2, 3, scaling=scaling)
    _, after = run(scaling, None, X, [0.0, 0.5])
    for state in (fresh, after):
        assert (state.weight is None) == (scaling != "normalised")
        assert state.total.shape == (2, 2, 3)
    if scaling == "normalised":
        expected = [5.0, sum(np.exp(-0.5 * k) for k in range(5))]
        np.testing.assert_allclose(after.weight[:, :, 0], [expected, expected], rtol=1e-6)


def test_a_constant_is_its_own_normalised_average():
    x = np.full((1, 5, 1, 1), 3.0, np.float32)
    np.testing.assert_allclose(run("normalised", None, x, [0.7]).y, x, rtol=1e-6)


def test_no_initial_state_is_zero():
    zero = LeakyState(np.zeros((2, 2, 3), np.float32), None)
    fresh, started = (run("sum", state, X, [0.1, 2.0]).y for state in (None, zero))
    np.testing.assert_array_equal(fresh, started)


def test_wrong_number_of_rates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"rate has shape \(3,\).*one rate per head, shape \(2,\)"):
        jax.eval_shape(leaky_average, X, np.zeros(3, np.float32))


def test_unknown_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        UnknownName, match=r"Unknown scaling 'normalized'\. Did you mean normalised"
    ):
        leaky_average(X, np.zeros(2, np.float32), scaling="normalized")
    with pytest.raises(
        UnknownName, match=r"Unknown implementation 'referencee'\. Did you mean refer"
    ):
        leaky_average(X, np.zeros(2, np.float32), implementation="referencee")
