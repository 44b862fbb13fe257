"""What a leaky average promises beside its numbers: state, parameter, errors."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ShapeError, UnknownName
from jaxmem.ops.leaky_average import LeakyState, decay_rate, init_leaky_state, leaky_average

X = jax.random.normal(jax.random.key(0), (2, 5, 2, 3))


def test_decay_rate_and_its_gradient():
    beta = jnp.array([-0.3, 0.0, 0.05])
    np.testing.assert_allclose(decay_rate(beta), [3.0, 0.0, 0.5], rtol=1e-6)
    grad = jax.grad(lambda b: jnp.sum(decay_rate(b)))(beta)
    np.testing.assert_array_equal(grad, [-10.0, 0.0, 10.0])


@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
def test_state_has_a_weight_only_where_it_is_needed(scaling: str):
    fresh = init_leaky_state(2, 2, 3, scaling=scaling)
    _, after = leaky_average(X, jnp.array([0.0, 0.5]), scaling=scaling, implementation="reference")
    for state in (fresh, after):
        assert (state.weight is None) == (scaling != "normalised")
        assert state.total.shape == (2, 2, 3)
    if scaling == "normalised":
        expected = [5.0, sum(np.exp(-0.5 * k) for k in range(5))]
        np.testing.assert_allclose(after.weight[:, :, 0], [expected, expected], rtol=1e-6)


def test_a_constant_is_its_own_normalised_average():
    x = jnp.full((1, 5, 1, 1), 3.0)
    y, _ = leaky_average(x, jnp.array([0.7]), scaling="normalised", implementation="reference")
    np.testing.assert_allclose(y, x, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["sum", "scaled", "normalised"])
def test_an_infinite_rate_forgets_all_in_one_step(scaling: str):
    forms = [{"implementation": name} for name in ("reference", "xla", "pallas")]
    forms.append({"implementation": "xla", "chunk_size": 2})

    def loss(rate: jax.Array, options: dict) -> tuple[jax.Array, jax.Array]:
        y, _ = leaky_average(X, rate, scaling=scaling, **options)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.grad(loss, has_aux=True)
    run = jax.jit(lambda rate: [grad(rate, form) for form in forms])
    for slope, y in run(jnp.full(2, jnp.inf)):
        np.testing.assert_allclose(y, X, rtol=1e-6)
        np.testing.assert_array_equal(slope, 0.0)


def test_no_initial_state_is_zero():
    rate = jnp.array([0.1, 2.0])
    fresh, _ = leaky_average(X, rate, implementation="reference")
    zero = LeakyState(jnp.zeros((2, 2, 3)), None)
    started, _ = leaky_average(X, rate, initial_state=zero, implementation="reference")
    np.testing.assert_array_equal(fresh, started)


def test_wrong_number_of_rates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"rate has shape \(3,\).*one rate per head, shape \(2,\)"):
        leaky_average(X, jnp.zeros(3))


def test_unknown_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        UnknownName, match=r"Unknown scaling 'normalized'\. Did you mean normalised"
    ):
        leaky_average(X, jnp.zeros(2), scaling="normalized")
    with pytest.raises(
        UnknownName, match=r"Unknown implementation 'referencee'\. Did you mean refer"
    ):
        leaky_average(X, jnp.zeros(2), implementation="referencee")
