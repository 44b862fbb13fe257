"""The kernels of the leaky average, interpreted, and its CPU form against float64 loops."""

from typing import Any, NamedTuple

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
from tests.helpers.leaky_average import IDS, LENGTH, direct, direct_gradients, inputs, state_of

RATES = np.array([0.02, 0.7, 4.0], np.float32)
WHOLE = LeakyAverageConfig(chunk=16, block=64)
SPLIT = LeakyAverageConfig(chunk=16, block=16, span=16, programs=10**6)
"""A program for every chunk of 16 tokens and 16 channels."""
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"implementation": "pallas", "config": WHOLE},
    "split": {"implementation": "pallas", "config": SPLIT},
    "steps": {"implementation": "xla"},
}


class Result(NamedTuple):
    y: jax.Array
    total: jax.Array
    grads: tuple[jax.Array, jax.Array, jax.Array]


def weights_of(array: Any) -> np.ndarray:
    return np.cos(np.arange(array.size)).reshape(array.shape).astype(np.float32)


def run(x: Any, rate: Any, start: Any, **options: Any) -> Result:
    """Return outputs and gradients of a weighted sum of them."""

    @jax.jit
    def both(x: jax.Array, rate: jax.Array, start: jax.Array) -> Any:
        def scalar(x: jax.Array, rate: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
            y, state = leaky_average(x, rate, initial_state=LeakyState(start, None), **options)
            value = jnp.sum(y.astype(jnp.float32) * weights_of(y))
            return value + jnp.sum(state.total * weights_of(start)), (y, state.total)

        return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(x, rate, start)

    (_, out), grads = both(x, rate, start)
    return Result(*out, grads)


def check(x: Any, start: Any, ids: Any = None, initial: Any = None, **options: Any) -> Result:
    given = {
        "segment_ids": None if ids is None else jnp.asarray(ids),
        "initial_segment": None if initial is None else jnp.asarray(initial),
    }
    result = run(x, RATES, start, **given, **options)
    expected = direct(x, RATES, start, start[..., :1], ids=ids, initial=initial)
    assert_close((result.y, result.total), (expected.y, expected.total), FORWARD)
    grads = direct_gradients(
        x, RATES, start, weights_of(x), weights_of(start), ids=ids, initial=initial
    )
    assert_close(result.grads, tuple(grads), GRADIENT)
    return result


@pytest.mark.parametrize(
    ("length", "width", "form"),
    [
        (1, 16, "whole"),
        (15, 40, "whole"),
        (16, 1, "whole"),
        (17, 80, "whole"),
        (31, 16, "split"),
        (32, 16, "split"),
        (69, 40, "split"),
        (1, 2, "steps"),
        (17, 2, "steps"),
    ],
)
def test_lengths_and_widths(length: int, width: int, form: str):
    x, start, _ = inputs(2, length, width=width)
    check(x, start, **FORMS[form])


def test_default_tiles():
    """The shipped tiles: two blocks of channels, and two chunks, the last one partly filled."""
    x, start, _ = inputs(1, 40, width=128)
    check(x, start, implementation="pallas")


def test_time_is_split():
    assert layout(SPLIT, (2, 69, 3, 40)).splits == 3
    assert layout(WHOLE, (2, 69, 3, 40)).splits == 1
    assert layout(LeakyAverageConfig(), (8, 2048, 16, 64)).splits == 2
    assert layout(LeakyAverageConfig(), (32, 2048, 16, 64)).splits == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("history", ["first document", "another"])
def test_segments(form: str, history: str):
    x, start, _ = inputs(len(IDS), LENGTH)
    initial = None if history == "first document" else np.array([9, 5, 2, 3, 3, 9], np.int32)
    result = check(x, start, IDS, initial, **FORMS[form])
    np.testing.assert_array_equal(np.asarray(result.y)[IDS == 0], 0.0)
    np.testing.assert_array_equal(np.asarray(result.grads[0])[IDS == 0], 0.0)
    np.testing.assert_array_equal(result.total[-1], start[-1])  # the row of padding


@pytest.mark.parametrize("scaling", ["scaled", "normalised"])
def test_scalings(scaling: str):
    x, start, weight = inputs(2, LENGTH)
    ids = jnp.asarray(IDS[2:4])

    def call(implementation: str, x: jax.Array, rate: jax.Array, state: LeakyState) -> Any:
        def scalar(*args: Any) -> tuple[jax.Array, Any]:
            x, rate, state = args
            y, after = leaky_average(
                x,
                rate,
                scaling=scaling,
                initial_state=state,
                segment_ids=ids,
                implementation=implementation,
                config=SPLIT,
            )
            return jnp.sum(y * weights_of(y)), (y, after)

        return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(x, rate, state)

    args = (x, RATES, state_of(start, weight, scaling))
    got, want = jax.jit(lambda *args: [call(form, *args) for form in ("pallas", "reference")])(
        *args
    )
    assert_close(got[0][1], want[0][1], FORWARD)
    assert_close(got[1], want[1], GRADIENT)


def test_two_halves_make_the_whole():
    x, start, _ = inputs(len(IDS), LENGTH)
    ids, options = jnp.asarray(IDS), FORMS["whole"]
    before = jnp.full(len(IDS), 9)
    at_cut = jnp.array([next((i for i in row[:17][::-1] if i), 9) for row in IDS])

    @jax.jit
    def both(x: jax.Array) -> Any:
        state = LeakyState(jnp.asarray(start), None)
        rate = jnp.asarray(RATES)
        whole = leaky_average(
            x, rate, initial_state=state, segment_ids=ids, initial_segment=before, **options
        )
        head, state = leaky_average(
            x[:, :17],
            rate,
            initial_state=state,
            segment_ids=ids[:, :17],
            initial_segment=before,
            **options,
        )
        tail, state = leaky_average(
            x[:, 17:],
            rate,
            initial_state=state,
            segment_ids=ids[:, 17:],
            initial_segment=at_cut,
            **options,
        )
        return whole, LeakyOutput(jnp.concatenate([head, tail], axis=1), state)

    whole, parts = both(x)
    assert_close(parts, whole, FORWARD)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any):
    x, start, _ = inputs(2, LENGTH)
    x = jnp.asarray(x, dtype)
    wide = np.asarray(x, np.float32)
    results = {p: run(x, RATES, start, **FORMS["split"], precision=p) for p in ("default", "high")}
    expected = direct(wide, RATES, start, start[..., :1])
    grads = direct_gradients(wide, RATES, start, weights_of(x), weights_of(start))
    for result in results.values():
        assert (result.y.dtype, result.total.dtype) == (dtype, np.float32)
        assert result.grads[0].dtype == dtype
        assert_close(result.y, expected.y, BFLOAT16)
        assert_close(result.grads, tuple(grads), BFLOAT16)
    # The carry is float32, and unless `default` is asked for, so are the weights in effect.
    high, low = (rms_error(results[p].total, expected.total) for p in ("high", "default"))
    assert high < 1e-5
    assert 1e-5 < low < 2e-3


X = jnp.asarray(inputs(2, 17, heads=1, width=16)[0])
RATE = jnp.array([0.3])


def loss(x: Any, rate: Any = RATE, implementation: str = "pallas") -> jax.Array:
    config = SPLIT if implementation == "pallas" else None
    y, state = leaky_average(x, rate, implementation=implementation, config=config)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state.total))


def test_transformations():
    """Vmap, scan and checkpoint together; jit and grad are in every other test."""

    def transformed(xs: jax.Array, rate: jax.Array, implementation: str) -> jax.Array:
        def run(x: jax.Array) -> jax.Array:
            return jax.checkpoint(lambda x: loss(x, rate, implementation))(x)

        def step(total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = jnp.sum(jax.vmap(run)(x))
            return total + value, value

        return jnp.sum(lax_scan(step, xs))

    def lax_scan(step: Any, xs: jax.Array) -> jax.Array:
        total, values = jax.lax.scan(step, jnp.float32(0), xs)
        return total + jnp.sum(values**2)

    xs = jnp.stack([X, 2 * X, X - 1, -X]).reshape(2, 2, *X.shape)
    results = [
        jax.jit(jax.value_and_grad(transformed, argnums=(0, 1)), static_argnums=2)(xs, RATE, form)
        for form in ("pallas", "xla")
    ]
    assert_close(results[0], results[1], GRADIENT)


def test_shard_map():
    mesh = make_mesh((2,), ("batch",), jax.devices()[:2])
    part = jax.sharding.PartitionSpec("batch")

    def grads(x: jax.Array) -> jax.Array:
        return jax.grad(loss)(x)

    sharded = jax.shard_map(grads, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    assert_close(jax.jit(sharded)(X), jax.jit(grads)(X), FORWARD)


def test_second_derivative_is_refused():
    with pytest.raises(KernelUnsupported, match=r"first derivatives only.*implementation='xla'"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(X)


@pytest.mark.parametrize(
    ("x", "config", "message"),
    [
        (jnp.zeros((1, 4, 1, 257)), None, "head widths to 256, not 257"),
        (X, LeakyAverageConfig(chunk=48), "chunk=48, which is no power of two"),
        (X, LeakyAverageConfig(chunk=256), r"leaky_average would use \d+ bytes of shared memory"),
    ],
)
def test_calls_that_a_kernel_cannot_take(x: Any, config: Any, message: str):
    with pytest.raises(KernelUnsupported, match=message):
        leaky_average(x, RATE, implementation="pallas", config=config)


def test_no_float64_kernel():
    with jax.enable_x64(True), pytest.raises(KernelUnsupported, match="float32, not float64"):
        leaky_average(jnp.zeros((1, 4, 1, 2), jnp.float64), RATE, implementation="pallas")


@pytest.mark.parametrize("scaling", ["sum", "normalised"])
@pytest.mark.parametrize("shape", [(0, 5, 1, 2), (2, 0, 1, 2)])
def test_no_row_and_no_token(shape: tuple[int, ...], scaling: str):
    state = state_of(jnp.ones((shape[0], 1, 2)), jnp.ones((shape[0], 1, 1)), scaling)
    options = {"initial_state": state, "segment_ids": jnp.ones(shape[:2], jnp.int32)}
    for name in ("xla", "reference", "pallas"):
        out = leaky_average(jnp.zeros(shape), RATE, scaling=scaling, implementation=name, **options)
        assert out.y.shape == shape
        assert_close(out.state, state, FORWARD)


def test_no_channel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match=r"an axis of x \(1, 4, 1, 0\) is empty"):
        leaky_average(jnp.zeros((1, 4, 1, 0)), RATE)
