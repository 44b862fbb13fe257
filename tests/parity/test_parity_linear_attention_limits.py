"""Linear, squared and polynomial attention at the limits that are legal, and under transforms."""

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
from jaxmem.ops.linear_attention import init_linear_state, linear_attention
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.squared_attention import feature_count, squared_attention
from pallas_kernels._compat import make_mesh
from tests.helpers.compare import FORWARD, GRADIENT, assert_close
from tests.helpers.linear_attention import functional, operands

SERIES = functools.partial(polynomial_attention, coefficients=3)
OPS: dict[str, Any] = {
    "linear": linear_attention,
    "squared": squared_attention,
    "polynomial": SERIES,
}
GATES = {"linear": "log_decay", "squared": "log_decay", "polynomial": "log_forget"}
PLAIN = ("xla", "reference")


def rows(length: int, batch: int = 2) -> dict[str, np.ndarray]:
    """Draw queries, keys, values and gates of as many tokens."""
    given = operands(1, length, heads=2, width=4, value_width=4, batch=batch)
    return {"q": given.q, "k": given.k, "v": given.v, "gates": given.log_decay - 0.1}


def narrow(given: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a, jnp.float32) for name, a in given.items()}


def read(op: str, given: dict[str, Any], **options: Any) -> Any:
    """Return what a call with gates returns, with the sums of weights."""
    options |= {} if op == "polynomial" else {"with_total": True}
    return OPS[op](given["q"], given["k"], given["v"], **{GATES[op]: given["gates"]}, **options)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize(("scale", "size"), [(1e-25, 1e12), (1e25, 1e-13)])
def test_scales_that_products_make_up_for(implementation: str, scale: float, size: float):
    """Squares of the products themselves would be infinite, or 0: 1e48 and 1e-52."""
    given = rows(19)
    given["q"], given["k"] = size * given["q"], size * given["k"]

    def scalar(given: dict[str, Any], form: str, power: int) -> tuple[Any, Any]:
        op = ("linear", "squared")[power - 1]
        y, total, _ = read(op, given, implementation=form, scale=scale)
        return functional((y, total)), (y, total)

    def both(given: dict[str, Any], form: str) -> Any:
        grad = jax.value_and_grad(scalar, has_aux=True)
        return [grad(given, form, power) for power in (1, 2)]

    got = jax.jit(both, static_argnums=1)(narrow(given), implementation)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(a, jnp.float64) for name, a in given.items()}
        expected = jax.tree.map(np.asarray, jax.jit(both, static_argnums=1)(wide, "reference"))
    assert np.max(np.abs(expected[1][0][1][1])) > 1e-3
    for (found, grads), (wanted, wanted_grads) in zip(got, expected, strict=True):
        assert_close(found[1], wanted[1], FORWARD)
        # Gradients of q and k differ by the scale: compare relative sizes.
        sizes = {name: float(np.max(np.abs(a))) for name, a in wanted_grads.items()}
        unit = [{name: g[name] / sizes[name] for name in g} for g in (grads, wanted_grads)]
        assert_close(*unit, GRADIENT)


@pytest.mark.parametrize("op", ["linear", "squared"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_growth_beyond_all_floats_stays_in_its_document(op: str, implementation: str):
    """Three documents in one chunk; the middle one grows, and the last one's gates are weak."""
    ids = np.repeat([3, 5, 6], [4, 5, 3])
    given = rows(12)
    given["gates"] = 0.01 * given["gates"]
    calm = narrow(given)
    given["gates"][0, 5], given["gates"][1, 6] = 1e30, np.inf
    options = {"segment_ids": jnp.broadcast_to(ids, (2, 12)), "implementation": implementation}
    run = jax.jit(lambda given: read(op, given, **options)[:2])
    outside = ids != 5
    found, wanted = (jax.tree.map(lambda a: a[:, outside], run(g)) for g in (narrow(given), calm))
    assert_close(found, wanted, FORWARD)


@pytest.mark.parametrize("implementation", PLAIN)
def test_polynomials_forget_everything(implementation: str):
    given = rows(9)
    given["gates"] = 0.01 * given["gates"]
    given["gates"][0, 5], given["gates"][1, 3] = -np.inf, -1e30
    finite = given | {"gates": np.maximum(given["gates"], -1e3)}

    @jax.jit
    def both(given: dict[str, Any]) -> Any:
        def scalar(given: dict[str, Any]) -> tuple[Any, Any]:
            outputs = tuple(read("polynomial", given, implementation=implementation))
            return functional(outputs), outputs

        return jax.value_and_grad(scalar, has_aux=True)(given)

    assert_close(both(narrow(given)), both(narrow(finite)), GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_nothing_gives_nothing(op: str):
    """No row or no token: empty results, and the state as it was."""
    for form in ("xla", "reference", *(() if op == "polynomial" else ("pallas",))):
        options: dict[str, Any] = {"implementation": form}
        if op != "polynomial":
            options |= {"segment_ids": jnp.ones((0, 5), jnp.int32)}
        none = narrow({name: a[:0] for name, a in rows(5).items()})
        y, total, *_ = read(op, none, **options)
        assert (y.shape, total.shape) == ((0, 5, 2, 4), (0, 5, 2))
        none = narrow({name: a[:, :0] for name, a in rows(5).items()})
        options = {"implementation": form}
        if op != "polynomial":
            options |= {"segment_ids": jnp.ones((2, 0), jnp.int32)}
        if form != "pallas" and op != "polynomial":
            features = 4 if op == "linear" else feature_count(4)
            state = init_linear_state(2, 2, features, 4, with_total=True)
            state = jax.tree.map(lambda a: a + 1.0, state)
            options |= {"initial_state": state}
        y, total, *after = read(op, none, **options)
        assert (y.shape, total.shape) == ((2, 0, 2, 4), (2, 0, 2))
        if "initial_state" in options:
            jax.tree.map(np.testing.assert_array_equal, after[0], options["initial_state"])
    if op == "polynomial":
        x = jnp.ones((2, 3, 2, 4))
        ids, no_ids = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 0), jnp.int32)
        places = Places(ids, no_ids, ids, no_ids)
        gates = jnp.ones((2, 0, 2))
        for form in PLAIN:
            options = {"places": places, "log_forget": gates, "implementation": form}
            np.testing.assert_array_equal(SERIES(x, x[:, :0], x[:, :0], **options).y, 0.0 * x)


@pytest.mark.parametrize("op", OPS)
def test_arrays_of_numpy_and_its_scalars(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = rows(5)
    options: dict[str, Any] = {"scale": np.float64(0.25)}
    if op != "polynomial":
        features = 4 if op == "linear" else feature_count(4)
        state = init_linear_state(2, 2, features, 4, with_total=True)
        state = jax.tree.map(lambda a: np.asarray(a, np.float64), state)
        options |= {"initial_state": state, "segment_ids": np.ones((2, 5), np.int64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(op, given, **options)
        default = read(op, given, **options | {"scale": None})
        half = read(op, given, **options | {"scale": np.float32(0.5)})
    wanted = read(op, narrow(given), **options | {"scale": 0.25})
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found.y.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, default, half)  # 1/sqrt(4)


def losses(op: str, length: int, form: str) -> tuple[Any, tuple[jax.Array, ...]]:
    """Return a scalar function of q, k, v and gates, and such operands."""
    given = narrow(rows(length, batch=1))
    ids = jnp.asarray([[0, 1, 1, 2] + [2] * (length - 4)])

    def loss(*arrays: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"implementation": form}
        if op != "polynomial":
            options |= {"segment_ids": ids, "chunk_size": 4}
        outputs = read(op, dict(zip(given, arrays, strict=True)), **options)
        return functional(jax.tree.map(jnp.sin, tuple(outputs)))

    return loss, tuple(given.values())


@pytest.mark.parametrize("op", OPS)
def test_every_order_of_derivatives(op: str):
    """Forward, reverse, forward over reverse and reverse over reverse agree with each other."""
    length = 11

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(form: str) -> tuple[Any, ...]:
        loss, at = losses(op, length, form)
        along = jax.tree.map(jnp.cos, at)
        grad = jax.grad(loss, argnums=(0, 1, 2, 3))

        def inner(*at: jax.Array) -> jax.Array:
            products = jax.tree.map(lambda a, b: jnp.sum(a * b), grad(*at), along)
            return sum(jax.tree.leaves(products))

        slope = jax.jvp(loss, at, along)[1]
        forward_over_reverse = jax.jvp(grad, at, along)[1]
        reverse_over_reverse = jax.grad(inner, argnums=(0, 1, 2, 3))(*at)
        return slope, inner(*at), forward_over_reverse, reverse_over_reverse

    slope, by_grad, forward, reverse = derivatives("xla")
    assert_close(slope, by_grad, GRADIENT)
    assert_close(forward, reverse, GRADIENT)
    assert_close((slope, forward), derivatives("reference")[::2], GRADIENT)


@pytest.mark.parametrize("op", ["squared", "polynomial"])
def test_tiles_in_a_loop_have_derivatives_of_all_orders(op: str):
    loss, at = losses(op, 150, "xla")
    along = jax.tree.map(jnp.cos, at)

    @jax.jit
    def products(*at: jax.Array) -> tuple[Any, Any, Any]:
        grad = jax.grad(loss)
        slope, by_grad = jax.jvp(loss, at, (along[0], *map(jnp.zeros_like, at[1:])))[1], grad(*at)
        hessian = jax.jvp(lambda q: grad(q, *at[1:]), at[:1], along[:1])[1]
        again = jax.grad(lambda q: jnp.sum(grad(q, *at[1:]) * along[0]))(at[0])
        return (slope, jnp.sum(by_grad * along[0])), (hessian, again), by_grad

    (slope, by_grad), (hessian, again), _ = products(*at)
    assert_close(slope, by_grad, GRADIENT)
    assert_close(hessian, again, GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_forms_run_and_differentiate_where_varying_axes_are_checked(op: str):
    mesh = make_mesh((2,), ("data",), jax.devices()[:2])
    short, long = narrow(rows(9)), narrow(rows(150))
    cases = [("xla", short), ("reference", short), ("xla", long)][: 3 if op != "linear" else 2]

    @functools.partial(jax.jit, static_argnums=0)
    def run(split: bool) -> Any:
        found = []
        for form, given in cases:

            def call(given: dict[str, Any], form: str = form) -> Any:
                return tuple(read(op, given, implementation=form)[:2])

            whole = call
            if split:
                data = jax.P("data")
                whole = jax.shard_map(call, mesh=mesh, in_specs=(data,), out_specs=data)

            def loss(given: dict[str, Any], whole: Any = whole) -> tuple[Any, Any]:
                y = whole(given)
                return functional(y), y

            (_, y), grads = jax.value_and_grad(loss, has_aux=True)(given)
            found.append((y, grads))
        return found

    assert_close(run(True), run(False), GRADIENT)


@pytest.mark.parametrize("op", OPS)
def test_export_with_a_symbolic_batch_and_length(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def arguments(shape: str) -> Any:
        sizes = export.symbolic_shape(shape)
        x = jax.ShapeDtypeStruct((*sizes, 2, 4), jnp.float32)
        return x, x, x, jax.ShapeDtypeStruct((*sizes, 2), jnp.float32)

    given = narrow(rows(9))
    for form in PLAIN:

        def call(*arrays: jax.Array, form: str = form) -> Any:
            return read(op, dict(zip(given, arrays, strict=True)), implementation=form).y

        # Both lengths compile one program of all sizes; batches alone do so too.
        shapes = ["b, 9", "b, t"]
        for shape in shapes:
            if op == "polynomial" and form == "xla" and shape == "b, t":
                with pytest.raises(ShapeError, match=r"symbolic.*'reference'"):
                    export.export(jax.jit(call))(*arguments(shape))
                continue
            program = export.export(jax.jit(call))(*arguments(shape))
            assert_close(program.call(*given.values()), call(*given.values()), FORWARD)
