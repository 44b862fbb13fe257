"""Linear, squared and polynomial attention at the limits that are legal, and under transforms.

`tests/unit/ops/test_transforms.py` tries every transformation with short rows of each form.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import export

from jaxmem.errors import ShapeError
from jaxmem.ops.attention_terms import Places
from jaxmem.ops.linear_attention import LinearState, linear_attention
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.squared_attention import feature_count, squared_attention
from pallas_kernels._compat import make_mesh
from tests.helpers.compare import FORWARD, GRADIENT, assert_close
from tests.helpers.linear_attention import (
    Operands,
    exact,
    exact_series,
    functional,
    operands,
    waves,
)

SERIES = functools.partial(polynomial_attention, coefficients=3)
TAYLOR = np.array([1.0, 1.0, 0.5])
OPS: dict[str, Any] = {
    "linear": linear_attention,
    "squared": squared_attention,
    "polynomial": SERIES,
}
GATES = {"linear": "log_decay", "squared": "log_decay", "polynomial": "log_forget"}
PLAIN = ("xla", "reference")
WIDTH = 4


def rows(length: int, batch: int = 2) -> Operands:
    """Draw queries, keys, values and gates of as many tokens."""
    given = operands(1, length, heads=2, width=WIDTH, value_width=WIDTH, batch=batch)
    return given._replace(log_decay=given.log_decay - np.float32(0.1), state=None)


def read(op: str, given: Operands, **options: Any) -> Any:
    """Return what a call with gates returns, with the sums of weights."""
    q, k, v, gates, _ = given
    options |= {} if op == "polynomial" else {"with_total": True}
    return OPS[op](q, k, v, **{GATES[op]: gates}, **options)


def wanted(op: str, given: Operands, scale: float = WIDTH**-0.5) -> tuple[Any, Operands]:
    """Return y and total, and the gradients of their sum by `waves`."""
    if op == "polynomial":
        outputs, grads = exact_series(TAYLOR, scale, given)
    else:
        outputs, grads = exact(1 + (op == "squared"), scale, given, with_state=False)
    return outputs[:2], grads


# Squares of the products themselves would be infinite, or 0: 1e48 and 1e-52.
@pytest.mark.parametrize(
    ("op", "implementation", "scale"),
    [
        ("linear", "reference", 1e25),
        ("linear", "xla", 1e-25),
        ("linear", "pallas", 1e25),
        *(("squared", form, scale) for form in (*PLAIN, "pallas") for scale in (1e-25, 1e25)),
    ],
)
def test_scales_that_products_make_up_for(op: str, implementation: str, scale: float):
    size = np.float32(1e12 if scale < 1.0 else 1e-13)
    given = rows(19)
    given = given._replace(q=size * given.q, k=size * given.k)

    @jax.jit
    def both(given: Operands) -> tuple[Any, Operands]:
        def call(given: Operands) -> Any:
            return tuple(read(op, given, implementation=implementation, scale=scale)[:2])

        outputs, pull = jax.vjp(call, given)
        return outputs, pull(waves(outputs))[0]

    got, expected = both(given), wanted(op, given, scale)
    assert np.max(np.abs(expected[0][1])) > 1e-3
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_nothing_gives_nothing(op: str):
    """No row or no token: empty results, and the state as it was."""
    forms = PLAIN if op == "polynomial" else (*PLAIN, "pallas")
    features = feature_count(WIDTH) if op == "squared" else WIDTH
    state = LinearState(*(np.ones((2, 2, features, WIDTH)[:n], np.float32) for n in (4, 3)))

    @jax.jit
    def run(given: Operands, state: LinearState) -> Any:
        found = {}
        for form in forms:
            no_row, no_token = jax.tree.map(lambda a: a[:0], given), of_tokens(given, 0)
            by_row, by_token = ({"implementation": form} for _ in range(2))
            if op != "polynomial":
                by_row["segment_ids"] = jnp.ones((0, 5), jnp.int32)
                by_token["segment_ids"] = jnp.ones((2, 0), jnp.int32)
                by_token |= {"initial_state": state} if form != "pallas" else {}
            found[form] = read(op, no_row, **by_row), read(op, no_token, **by_token)
        return found

    for form, (no_row, no_token) in run(rows(5), state).items():
        assert (no_row.y.shape, no_row.total.shape) == ((0, 5, 2, WIDTH), (0, 5, 2))
        assert (no_token.y.shape, no_token.total.shape) == ((2, 0, 2, WIDTH), (2, 0, 2))
        if op != "polynomial" and form != "pallas":
            jax.tree.map(np.testing.assert_array_equal, no_token.state, state)


def of_tokens(given: Operands, length: int) -> Operands:
    return jax.tree.map(lambda a: a[:, :length], given)


def test_polynomials_of_no_key_are_nothing():
    @jax.jit
    def run(given: Operands) -> Any:
        ids = jnp.ones((2, 3), jnp.int32)
        places = Places(ids, ids[:, :0], ids, ids[:, :0])
        none = of_tokens(given, 0)._replace(q=given.q)
        return [read("polynomial", none, places=places, implementation=form).y for form in PLAIN]

    for y in run(rows(3)):
        np.testing.assert_array_equal(y, np.zeros((2, 3, 2, WIDTH)))


@pytest.mark.parametrize("op", OPS)
def test_arrays_of_numpy_and_its_scalars(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given, features = rows(5), feature_count(WIDTH) if op == "squared" else WIDTH
    options: dict[str, Any] = {}
    if op != "polynomial":
        state = LinearState(*(np.ones((2, 2, features, WIDTH)[:n], np.float32) for n in (4, 3)))
        options = {"initial_state": state, "segment_ids": np.ones((2, 5), np.int32)}
    twice = {np.dtype(np.float32): np.float64, np.dtype(np.int32): np.int64}
    wide = jax.tree.map(lambda a: a.astype(twice[a.dtype]), (given, options))
    narrow = jax.tree.map(jnp.asarray, (given, options))

    # Not as arguments of a compiled function, which would be arrays of JAX in it.
    def call(arrays: Any, scale: Any) -> Any:
        return read(op, arrays[0], scale=scale, **arrays[1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.jit(lambda: call(wide, np.float64(0.25)))()
        default, half = (
            jax.make_jaxpr(lambda s=s: call(wide, s))() for s in (None, np.float32(0.5))
        )
    expected = jax.jit(lambda: call(narrow, 0.25))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.y.dtype == jnp.float32
    assert str(default) == str(half)  # one program, for 1/sqrt(4) is a half


@pytest.mark.parametrize("op", ["squared", "polynomial"])
def test_tiles_in_a_loop_have_derivatives_of_all_orders(op: str):
    """Forward, reverse, forward over reverse and reverse over reverse agree with each other.

    Taylor's sum, which has a rule of its own, is compared with the reference too.
    """
    length = 150
    given = rows(length, batch=1)
    along = jax.tree.map(np.cos, given)
    ids = np.array([[0, 1, 1, 2] + [2] * (length - 4)])

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(form: str, given: Operands, along: Operands) -> tuple[Any, ...]:
        @jax.jit
        def loss(given: Operands) -> jax.Array:
            options = {} if op == "polynomial" else {"segment_ids": jnp.asarray(ids)}
            outputs = read(op, given, implementation=form, **options)
            return functional(jax.tree.map(jnp.sin, tuple(outputs)))

        grad = jax.jit(jax.grad(loss))

        def inner(given: Operands) -> jax.Array:
            products = jax.tree.map(lambda a, b: jnp.sum(a * b), grad(given), along)
            return sum(jax.tree.leaves(products))

        slope = jax.jvp(loss, (given,), (along,))[1]
        forward_over_reverse = jax.jvp(grad, (given,), (along,))[1]
        by_grad, reverse_over_reverse = jax.value_and_grad(inner)(given)
        return slope, by_grad, forward_over_reverse, reverse_over_reverse

    slope, by_grad, forward, reverse = derivatives("xla", given, along)
    assert_close(slope, by_grad, GRADIENT)
    assert_close(forward, reverse, GRADIENT)
    if op == "polynomial":
        assert_close((slope, forward), derivatives("reference", given, along)[::2], GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_forms_run_and_differentiate_where_varying_axes_are_checked(op: str):
    mesh, data = make_mesh((2,), ("data",), jax.devices()[:2]), jax.P("data")
    cases = [("xla", rows(9)), ("reference", rows(9)), ("xla", rows(150))]
    cases = cases[: 3 if op != "linear" else 2]

    @jax.jit
    def run(given: list[Operands]) -> Any:
        found = []
        for (form, _), each in zip(cases, given, strict=True):

            def call(given: Operands, form: str = form) -> Any:
                return tuple(read(op, given, implementation=form)[:2])

            whole = jax.shard_map(call, mesh=mesh, in_specs=(data,), out_specs=data)
            outputs, pull = jax.vjp(whole, each)
            found.append((outputs, pull(waves(outputs))[0]))
        return found

    given = [each for _, each in cases]
    assert_close(run(given), [wanted(op, each) for each in given], GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_export_with_a_symbolic_batch_and_length(op: str, monkeypatch: pytest.MonkeyPatch):
    """Tiles of pairs, Taylor's sum; `test_transforms.py` exports all else with any length."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = rows(9)

    def exported(form: str, shape: str) -> Any:
        sizes = export.symbolic_shape(shape)
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((*sizes, *a.shape[2:]), jnp.float32), given
        )
        return export.export(
            jax.jit(lambda *rows: read(op, Operands(*rows, None), implementation=form).y)
        )(*arguments[:4])

    shapes = [("xla", "b, 9")]
    if op == "polynomial":
        shapes.append(("reference", "b, t"))
        with pytest.raises(ShapeError, match=r"symbolic.*'reference'"):
            exported("xla", "b, t")
    for form, shape in shapes:
        y = exported(form, shape).call(*given[:4])
        assert_close(y, wanted(op, given)[0][0], FORWARD)
