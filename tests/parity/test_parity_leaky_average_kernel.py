"""The kernels of the leaky average, interpreted, and its CPU form against float64 loops.

A form is compiled once for each scaling and set of shapes: all else, documents too, is data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops.leaky_average import LeakyOutput, LeakyState, leaky_average
from pallas_kernels._compat import make_mesh
from pallas_kernels.leaky_average import LeakyAverageConfig
from pallas_kernels.leaky_average.launch import layout
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close, rms_error
from tests.helpers.leaky_average import (
    IDS,
    LENGTH,
    Documents,
    documents_at,
    exact,
    first_documents,
    inputs,
    state_of,
    waves,
    weights_of,
    with_gradients,
)

RATES = np.array([0.02, 0.7, 4.0], np.float32)
WHOLE = LeakyAverageConfig(chunk=16, block=64)
SPLIT = LeakyAverageConfig(chunk=16, block=16, span=16, programs=10**6)
"""A program for every chunk of 16 tokens and 16 channels."""
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"implementation": "pallas", "config": WHOLE},
    "split": {"implementation": "pallas", "config": SPLIT},
    "steps": {"implementation": "xla"},
    "default": {"implementation": "pallas"},
}
ANOTHER = np.array([9, 5, 2, 3, 3, 9], np.int32)


@functools.cache
def compiled(form: str, scaling: str) -> Callable[..., Any]:
    return with_gradients(scaling=scaling, **FORMS[form])


def check(
    form: str, x: Any, state: LeakyState, documents: Any = None, *, scaling: str = "sum"
) -> Any:
    """Compare outputs and gradients with exact ones."""
    weights = weights_of(x, state)
    found = compiled(form, scaling)(x, RATES, state, documents, weights)
    expected = exact(x, RATES, state, weights, scaling=scaling, documents=documents)
    assert_close(found[0], expected[0], FORWARD)
    assert_close(found[1], expected[1], GRADIENT)
    return found


@pytest.mark.parametrize(
    ("length", "width", "form", "scaling"),
    [
        (1, 16, "whole", "sum"),
        (16, 1, "whole", "scaled"),
        (37, 80, "whole", "sum"),  # two blocks of channels, the last chunk and block partly filled
        (32, 16, "split", "sum"),
        (69, 40, "split", "sum"),
        (1, 2, "steps", "sum"),
        (17, 2, "steps", "sum"),
        (40, 128, "default", "sum"),  # the shipped tiles: two blocks of channels and two chunks
    ],
)
def test_lengths_and_widths(length: int, width: int, form: str, scaling: str):
    x, start, _ = inputs(2, length, width=width)
    check(form, x, LeakyState(start, None), scaling=scaling)


def test_time_is_split():
    assert layout(SPLIT, (2, 69, 3, 40)).splits == 3
    assert layout(WHOLE, (2, 69, 3, 40)).splits == 1
    assert layout(LeakyAverageConfig(), (8, 2048, 16, 64)).splits == 2
    assert layout(LeakyAverageConfig(), (32, 2048, 16, 64)).splits == 1


@pytest.mark.parametrize("form", ["whole", "split", "steps"])
@pytest.mark.parametrize("initial", [first_documents(IDS), ANOTHER], ids=["first", "another"])
def test_segments(initial: np.ndarray, form: str):
    x, start, _ = inputs(len(IDS), LENGTH)
    (y, state), (x_grad, _, _) = check(form, x, LeakyState(start, None), Documents(IDS, initial))
    np.testing.assert_array_equal(np.asarray(y)[IDS == 0], 0.0)
    np.testing.assert_array_equal(np.asarray(x_grad)[IDS == 0], 0.0)
    np.testing.assert_array_equal(state.total[-1], start[-1])  # the row of padding


def test_a_normalised_average_of_packed_rows():
    x, start, weight = inputs(len(IDS), LENGTH)
    check("split", x, LeakyState(start, weight), Documents(IDS, ANOTHER), scaling="normalised")


ONE = np.ones_like(IDS)


@pytest.mark.parametrize(
    ("scaling", "form", "shape", "documents"),
    [
        ("sum", "split", (*IDS.shape, 3, 2), Documents(ONE, ONE[:, 0])),
        ("normalised", "split", (*IDS.shape, 3, 2), Documents(ONE, ONE[:, 0])),
        ("scaled", "whole", (2, 16, 3, 1), None),
    ],
)
def test_an_infinite_rate_forgets_all_in_one_step(
    scaling: str, form: str, shape: tuple[int, ...], documents: Documents | None
):
    batch, length, heads, width = shape
    x, start, weight = inputs(batch, length, heads, width)
    state, rate = state_of(start, weight, scaling), np.full(heads, np.inf, np.float32)
    run, weights = compiled(form, scaling), weights_of(x, state)
    (y, _), (_, slope, _) = run(x, rate, state, documents, weights)
    np.testing.assert_allclose(y, x, rtol=1e-6)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize(("length", "width", "form"), [(37, 80, "whole"), (69, 40, "split")])
def test_extreme_rates(length: int, width: int, form: str):
    x, start, _ = inputs(2, length, width=width)
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


@pytest.mark.parametrize("form", ["whole", "split", "steps"])
def test_two_halves_make_the_whole(form: str):
    """Each half is padding in the call of the other."""
    x, start, _ = inputs(len(IDS), LENGTH)
    state = LeakyState(start, None)
    run, weights = compiled(form, "sum"), weights_of(x, state)
    early, late = documents_at(17, ANOTHER)
    whole, _ = run(x, RATES, state, Documents(IDS, ANOTHER), weights)
    head, _ = run(x, RATES, state, early, weights)
    tail, _ = run(x, RATES, head.state, late, weights)
    assert_close(LeakyOutput(head.y + tail.y, tail.state), whole, FORWARD)


@pytest.mark.parametrize(
    ("dtype", "precision", "differentiated"),
    [
        (jnp.bfloat16, "default", False),
        (jnp.bfloat16, "high", True),
        (jnp.float16, "default", True),
        (jnp.float16, "high", False),
    ],
)
def test_half_precision(dtype: Any, precision: Any, differentiated: bool):
    x, start, _ = inputs(2, LENGTH)
    x, state = x.astype(dtype), LeakyState(start, None)
    weights = weights_of(x, state)
    expected, expected_grads = exact(x.astype(np.float32), RATES, state, weights)
    options = {**FORMS["split"], "precision": precision}
    if differentiated:
        out, grads = with_gradients(**options)(x, RATES, state, None, weights)
        assert grads[0].dtype == dtype
        assert_close(grads, expected_grads, BFLOAT16)
    else:
        run = jax.jit(lambda x, rate, s: leaky_average(x, rate, initial_state=s, **options))
        out = run(x, RATES, state)
    assert (out.y.dtype, out.state.total.dtype) == (dtype, np.float32)
    assert_close(out.y, expected.y, BFLOAT16)
    # The carry is float32, and unless `default` is asked for, so are the weights in effect.
    error = rms_error(np.asarray(out.state.total), expected.state.total)
    low, high = {"high": (0.0, 1e-5), "default": (1e-5, 2e-3)}[precision]
    assert low <= error < high


X = inputs(2, 17, heads=1, width=16)[0]
RATE = np.array([0.3], np.float32)


def loss(x: Any, rate: Any, implementation: str = "pallas") -> jax.Array:
    config = SPLIT if implementation == "pallas" else None
    y, state = leaky_average(x, rate, implementation=implementation, config=config)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state.total))


def test_transformations():
    """Vmap, scan and checkpoint together; jit and grad are in every other test."""

    def transformed(xs: jax.Array, rate: jax.Array, implementation: str) -> jax.Array:
        run = jax.checkpoint(lambda x: loss(x, rate, implementation))

        def step(total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = jnp.sum(jax.vmap(run)(x))
            return total + value, value

        total, values = jax.lax.scan(step, jnp.float32(0), xs)
        return total + jnp.sum(values**2)

    xs = np.stack([X, 2 * X, X - 1, -X]).reshape(2, 2, *X.shape)
    results = [
        jax.jit(jax.value_and_grad(transformed, argnums=(0, 1)), static_argnums=2)(xs, RATE, form)
        for form in ("pallas", "xla")
    ]
    assert_close(results[0], results[1], GRADIENT)


def test_shard_map():
    mesh = make_mesh((2,), ("batch",), jax.devices()[:2])
    part = jax.sharding.PartitionSpec("batch")

    def grads(x: jax.Array) -> jax.Array:
        return jax.grad(loss)(x, jnp.asarray(RATE))

    sharded = jax.shard_map(grads, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    assert_close(jax.jit(sharded)(X), jax.jit(grads)(X), FORWARD)


def test_second_derivative_is_refused():
    def once(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(loss)(x, jnp.asarray(RATE)) ** 2)

    with pytest.raises(KernelUnsupported, match=r"first derivatives only.*implementation='xla'"):
        jax.eval_shape(jax.grad(once), X)


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((1, 4, 1, 257), None, "head widths to 256, not 257"),
        (X.shape, LeakyAverageConfig(chunk=48), "chunk=48, which is no power of two"),
        (
            X.shape,
            LeakyAverageConfig(chunk=256),
            r"leaky_average would use \d+ bytes of shared memory",
        ),
    ],
)
def test_calls_that_a_kernel_cannot_take(shape: tuple[int, ...], config: Any, message: str):
    run = functools.partial(leaky_average, implementation="pallas", config=config)
    with pytest.raises(KernelUnsupported, match=message):
        jax.eval_shape(run, np.zeros(shape, np.float32), RATE)


def test_no_float64_kernel():
    run = functools.partial(leaky_average, implementation="pallas")
    with jax.enable_x64(True), pytest.raises(KernelUnsupported, match="float32, not float64"):
        jax.eval_shape(run, np.zeros((1, 4, 1, 2)), RATE)


@pytest.mark.parametrize("scaling", ["sum", "normalised"])
@pytest.mark.parametrize("shape", [(0, 5, 1, 2), (2, 0, 1, 2)])
def test_no_row_and_no_token(shape: tuple[int, ...], scaling: str):
    x, total = np.zeros(shape, np.float32), np.ones((shape[0], 1, 2), np.float32)
    state, ids = state_of(total, total[..., :1], scaling), np.ones(shape[:2], np.int32)

    @jax.jit
    def run(x: Any, rate: Any, state: Any, ids: Any) -> list[LeakyOutput]:
        call = functools.partial(leaky_average, x, rate, scaling=scaling, initial_state=state)
        names = ("xla", "reference", "pallas")
        return [call(segment_ids=ids, implementation=name) for name in names]

    for out in run(x, RATE, state, ids):
        assert out.y.shape == shape
        assert_close(out.state, state, FORWARD)


def test_no_channel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"an axis of x \(1, 4, 1, 0\) is empty"):
        jax.eval_shape(leaky_average, np.zeros((1, 4, 1, 0), np.float32), RATE)
