"""Rotary positions: both layouts against complex numbers, and the property they exist for."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, ShapeError, UnknownName
from jaxmem.ops.rope import rope
from tests.helpers.compare import FORWARD, GRADIENT, assert_close
from tests.helpers.derivatives import check_modes, derivatives

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
PLACES = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 8191, 2]])


def turned(x: Any, positions: np.ndarray, layout: str, theta: float) -> np.ndarray:
    """The channels as complex numbers, times e^{iφ}, in float64."""
    x = np.asarray(x, np.float64)
    width = x.shape[-1]
    first, second = (
        (np.arange(width // 2), np.arange(width // 2, width))
        if layout == "half"
        else (np.arange(0, width, 2), np.arange(1, width, 2))
    )
    rates = np.array([theta ** (-2 * i / width) for i in range(width // 2)])
    angles = positions[..., None, None] * rates
    numbers = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    y = np.empty_like(x)
    y[..., first], y[..., second] = numbers.real, numbers.imag
    return y


@pytest.mark.parametrize("theta", [10000.0, 50.0])
@pytest.mark.parametrize("layout", ["half", "pairs"])
@pytest.mark.parametrize("places", [PLACES[0], PLACES[:, :4]], ids=["row", "rows"])
def test_rope_turns_complex_numbers(places: np.ndarray, layout: Any, theta: float):
    x = X[:, : places.shape[-1]]
    places = np.minimum(places, 100)
    y = jax.jit(lambda x, p: rope(x, p, layout=layout, theta=theta))(x, jnp.asarray(places))
    # Angles up to 100 are rounded to 4e-6.
    assert_close(y, turned(x, places, layout, theta), FORWARD._replace(rms=5e-6))


@pytest.mark.parametrize("layout", ["half", "pairs"])
def test_rope_of_doubles_has_their_precision(layout: Any):
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X, np.float64))
        y = rope(x, jnp.asarray(PLACES), layout=layout)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, turned(x, PLACES, layout, 10000.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["half", "pairs"])
def test_products_depend_on_distances(layout: Any):
    q, k = (jax.random.normal(jax.random.key(n), (1, 6, 2, 16)) for n in (1, 2))
    places = jnp.arange(6)

    def products(offset: int) -> jax.Array:
        turn = lambda x: rope(x, places + offset, layout=layout)  # noqa: E731
        return jnp.einsum("bthk,bshk->bhts", turn(q), turn(k))

    assert_close(products(100), products(0), FORWARD._replace(rtol=5e-5, atol=5e-5, rms=2e-5))
    assert not np.allclose(products(0), jnp.einsum("bthk,bshk->bhts", q, k), atol=0.1)


def test_the_layouts_are_one_function_up_to_the_order_of_channels():
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the pairs' channels in the halves
    pairs = rope(X[..., order], jnp.arange(5), layout="pairs")
    np.testing.assert_array_equal(pairs, rope(X, jnp.arange(5), layout="half")[..., order])


def test_half_precision_is_rounded_once():
    x = X.astype(jnp.bfloat16)
    y = rope(x, jnp.asarray(PLACES), layout="half")
    assert y.dtype == jnp.bfloat16
    wide = rope(x.astype(jnp.float32), jnp.asarray(PLACES), layout="half")
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(("length", "distinct"), [(256, 256), (2048, 641), (8192, 897)])
def test_positions_of_bfloat16_coincide(length: int, distinct: int):
    """The published baseline's: 2 apart above 256, 4 above 512, ..., 32 above 4096."""
    x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, length, 1, 2))
    turn = lambda dtype: rope(  # noqa: E731
        x, jnp.arange(length), layout="half", position_dtype=dtype
    )
    assert len(np.unique(np.asarray(turn("bfloat16"))[0, :, 0], axis=0)) == distinct
    np.testing.assert_array_equal(turn("bfloat16")[:, :257], turn("float32")[:, :257])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[..., :7]}, ShapeError, "7 channels per head.*even head_dim"),
        ({"x": X.astype(jnp.int32)}, DTypeError, "rope: x is int32"),
        ({"positions": jnp.arange(4)}, ShapeError, r"positions have shape \(4,\).*\(5,\)"),
        ({"theta": 0.0}, ConfigError, r"theta=0\.0 is not positive"),
        ({"layout": "halves"}, UnknownName, "Unknown rope layout 'halves'.*half"),
        ({"position_dtype": "bf16"}, UnknownName, "rope position_dtype 'bf16'.*bfloat16"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_mistakes_are_named(
    change: dict[str, Any],
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call: dict[str, Any] = {"x": X, "positions": jnp.arange(5), "layout": "half"} | change
    with pytest.raises(error, match=words):
        rope(**call)


@pytest.mark.parametrize("layout", ["half", "pairs"])
def test_every_derivative_of_a_turn(layout: Any):
    """A turn is linear, so its only tangent is itself and its gradient the turn back."""
    places = jnp.asarray(PLACES)

    @jax.jit
    def run(x: jax.Array, g: jax.Array) -> Any:
        turn = lambda x: rope(x, places, layout=layout)  # noqa: E731
        _, tangent = jax.jvp(turn, (x,), (g,))
        (back,) = jax.vjp(turn, x)[1](turn(g))
        return tangent, turn(g), back, derivatives(turn, x)

    g = jnp.cos(X)
    tangent, turned_g, back, every = run(X, g)
    np.testing.assert_array_equal(tangent, turned_g)
    assert_close(back, g, FORWARD)
    check_modes(every, lambda a, b: assert_close(a, b, GRADIENT))


def test_nothing_to_turn():
    for x in (X[:0], X[:, :0]):
        assert rope(x, jnp.arange(x.shape[1]), layout="half").shape == x.shape


def test_numpy_arrays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wide = np.asarray(X, np.float64)
    y = rope(wide, PLACES, layout="half")
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, rope(X, jnp.asarray(PLACES), layout="half"))
