"""Rotary positions: both layouts against complex numbers, and the property they exist for."""

import functools
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

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
PLACES = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 8191, 2]], np.int32)


@functools.partial(jax.jit, static_argnames=("layout", "theta", "position_dtype"))
def compiled(x: jax.Array, positions: jax.Array, **options: Any) -> jax.Array:
    return rope(x, positions, **options)


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
    y = compiled(x, places, layout=layout, theta=theta)
    # Angles up to 100 are rounded to 4e-6.
    assert_close(y, turned(x, places, layout, theta), FORWARD._replace(rms=5e-6))


@pytest.mark.parametrize("layout", ["half", "pairs"])
def test_rope_of_doubles_has_their_precision(layout: Any):
    x = X.astype(np.float64)
    with jax.enable_x64(True):
        y = np.asarray(compiled(x, PLACES, layout=layout))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, turned(x, PLACES, layout, 10000.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["half", "pairs"])
def test_products_depend_on_distances(layout: Any):
    q, k = np.random.default_rng(1).normal(size=(2, 1, 6, 2, 16)).astype(np.float32)
    places = np.arange(6, dtype=np.int32)

    def products(offset: int) -> np.ndarray:
        pair = (compiled(x, places + np.int32(offset), layout=layout) for x in (q, k))
        return np.einsum("bthk,bshk->bhts", *(np.asarray(a, np.float64) for a in pair))

    assert_close(products(100), products(0), FORWARD._replace(rtol=5e-5, atol=5e-5, rms=2e-5))
    assert not np.allclose(products(0), np.einsum("bthk,bshk->bhts", q, k), atol=0.1)


def test_the_layouts_are_one_function_up_to_the_order_of_channels():
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the pairs' channels in the halves
    pairs = compiled(X[..., order], PLACES, layout="pairs")
    halves = np.asarray(compiled(X, PLACES, layout="half"))
    np.testing.assert_array_equal(pairs, halves[..., order])


def test_half_precision_is_rounded_once():
    x = X.astype(jnp.bfloat16)
    y = compiled(x, PLACES, layout="half")
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(compiled(x.astype(np.float32), PLACES, layout="half"))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def test_positions_of_bfloat16_coincide():
    """The published baseline's: 2 apart above 256, 4 above 512, ..., 32 above 4096."""
    x = np.broadcast_to(np.float32([1.0, 0.0]), (1, 8192, 1, 2))
    places = np.arange(8192, dtype=np.int32)
    half, single = (
        np.asarray(compiled(x, places, layout="half", position_dtype=dtype))[0, :, 0]
        for dtype in ("bfloat16", "float32")
    )
    for length, distinct in ((256, 256), (2048, 641), (8192, 897)):
        assert len(np.unique(half[:length], axis=0)) == distinct, length
    np.testing.assert_array_equal(half[:257], single[:257])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[..., :7]}, ShapeError, "7 channels per head.*even head_dim"),
        ({"x": X.astype(np.int32)}, DTypeError, "rope: x is int32"),
        ({"positions": np.arange(4)}, ShapeError, r"positions have shape \(4,\).*\(5,\)"),
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
    call: dict[str, Any] = {"x": X, "positions": np.arange(5), "layout": "half"} | change
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

    g = np.cos(X)
    tangent, turned_g, back, every = run(X, g)
    np.testing.assert_array_equal(tangent, turned_g)
    assert_close(back, g, FORWARD)
    check_modes(every, lambda a, b: assert_close(a, b, GRADIENT))


def test_nothing_to_turn():
    for x in (X[:0], X[:, :0]):
        places = np.arange(x.shape[1], dtype=np.int32)
        assert compiled(x, places, layout="half").shape == x.shape


def test_numpy_arrays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # Constants of a program, which the function itself converts.
    y = jax.jit(lambda: rope(X.astype(np.float64), PLACES.astype(np.int64), layout="half"))()
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, compiled(X, PLACES, layout="half"))
