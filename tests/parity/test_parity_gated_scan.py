"""Every form of the gated scan against float64 loops; kernels are interpreted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops import gated_scan as op
from jaxmem.ops.gated_scan import gated_scan
from pallas_kernels._compat import make_mesh
from pallas_kernels.gated_scan import GatedScanConfig
from pallas_kernels.gated_scan.launch import layout
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close
from tests.helpers.leaky_average import IDS, LENGTH
from tests.helpers.off_cpu import elsewhere_only

WHOLE = GatedScanConfig(rows=4, block=64)
SPLIT = GatedScanConfig(rows=2, block=16, span=4, programs=10**6)
"""A program for every few tokens and 16 channels."""
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"implementation": "pallas", "config": WHOLE},
    "split": {"implementation": "pallas", "config": SPLIT},
    "steps": {"implementation": "xla"},
    "tree": {"implementation": "xla"},
    "reference": {"implementation": "reference"},
}


class Inputs(NamedTuple):
    x: Any
    log_decay: Any
    start: Any


class Result(NamedTuple):
    h: Any
    final: Any
    grads: Inputs


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of each form; the tree is what runs off the CPU."""
    use(request.param, monkeypatch)
    return FORMS[request.param]


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "tree":
        elsewhere_only(monkeypatch, op)


def inputs(batch: int, length: int, width: int = 3) -> Inputs:
    draw = np.random.default_rng(length)
    x = draw.normal(size=(batch, length, width))
    log_decay = -draw.exponential(0.5, size=(batch, length, width))
    start = draw.normal(size=(batch, width))
    return Inputs(*(a.astype(np.float32) for a in (x, log_decay, start)))


def weights_of(array: Any) -> np.ndarray:
    return np.cos(np.arange(array.size)).reshape(array.shape).astype(np.float32)


def direct(args: Inputs, ids: Any = None, initial: Any = None) -> Result:
    """Run the recurrence and its adjoint over the real tokens of every row, in float64."""
    x, log_decay, start = (np.asarray(a, np.float64) for a in args)
    gates, g, g_final = np.exp(log_decay), weights_of(x), weights_of(start)
    h, final = np.zeros_like(x), start.copy()
    grads = Inputs(np.zeros_like(x), np.zeros_like(x), np.zeros_like(start))
    for row in range(len(x)):
        names = np.ones(x.shape[1], int) if ids is None else ids[row]
        real = np.flatnonzero(names)
        document = names[real[0]] if initial is None and len(real) else 0
        document = document if initial is None else initial[row]
        before = []
        for t in real:
            continues, document = names[t] == document, names[t]
            before.append((final[row].copy(), continues))
            final[row] = (gates[row, t] * final[row] if continues else 0.0) + x[row, t]
            h[row, t] = final[row]
        handed = g_final[row]
        for t, (state, continues) in reversed(list(zip(real, before, strict=True))):
            grads.x[row, t] = g[row, t] + handed
            handed = gates[row, t] * grads.x[row, t] * continues
            grads.log_decay[row, t] = handed * state
        grads.start[row] = handed
    return Result(h, final, grads)


def run(args: Inputs, options: dict[str, Any]) -> Result:
    @jax.jit
    def both(args: Inputs) -> Any:
        def scalar(args: Inputs) -> tuple[jax.Array, Any]:
            h, final = gated_scan(args.x, args.log_decay, initial_state=args.start, **options)
            value = jnp.sum(h.astype(jnp.float32) * weights_of(h))
            return value + jnp.sum(final * weights_of(final)), (h, final)

        return jax.value_and_grad(scalar, has_aux=True)(args)

    (_, out), grads = both(args)
    return Result(*out, grads)


@pytest.mark.parametrize(
    ("length", "width", "name"),
    [
        (1, 16, "whole"),
        (3, 40, "whole"),
        (4, 70, "whole"),
        (17, 1, "split"),
        (23, 40, "split"),
        (1, 3, "steps"),
        (1, 3, "tree"),
        (23, 3, "steps"),
        (23, 3, "tree"),
        (23, 3, "reference"),
    ],
)
def test_lengths_and_widths(length: int, width: int, name: str, monkeypatch: pytest.MonkeyPatch):
    use(name, monkeypatch)
    args = inputs(2, length, width)
    assert_close(run(args, FORMS[name]), direct(args), GRADIENT)


def test_time_is_split():
    assert layout(SPLIT, (2, 23, 40)).splits == 4
    assert layout(WHOLE, (2, 23, 40)).splits == 1
    assert layout(GatedScanConfig(), (8, 2048, 1024)).splits == 8
    assert layout(GatedScanConfig(), (64, 2048, 1024)).splits == 1


@pytest.mark.parametrize("history", ["first document", "another"])
def test_segments(form: dict[str, Any], history: str):
    args = inputs(len(IDS), LENGTH)
    initial = None if history == "first document" else np.array([9, 5, 2, 3, 3, 9], np.int32)
    given = {
        "segment_ids": jnp.asarray(IDS),
        "initial_segment": None if initial is None else jnp.asarray(initial),
    }
    result = run(args, {**form, **given})
    assert_close(result, direct(args, IDS, initial), GRADIENT)
    for leaf in (result.h, result.grads.x, result.grads.log_decay):
        np.testing.assert_array_equal(np.asarray(leaf)[IDS == 0], 0.0)
    np.testing.assert_array_equal(result.final[-1], args.start[-1])  # the row of padding


def test_nothing_in_padding_reaches_real_tokens(form: dict[str, Any]):
    args = inputs(len(IDS), LENGTH)
    empty = (IDS == 0)[..., None]
    nan = args._replace(
        x=np.where(empty, np.nan, args.x), log_decay=np.where(empty, np.nan, args.log_decay)
    )
    options = {**form, "segment_ids": jnp.asarray(IDS)}
    assert_close(run(nan, options), direct(args, IDS), GRADIENT)


def test_extreme_gates(form: dict[str, Any]):
    """Nothing forgotten, everything forgotten, and gates that no float32 exponential can tell."""
    args = inputs(2, 19)
    log_decay = np.array(args.log_decay)
    log_decay[0, :, 0] = 0.0
    log_decay[0, 3::4, 1] = -np.inf
    log_decay[1, 2::3, 1] = -1e4
    log_decay[1, 3::3, 1] = -1e30
    log_decay[1, 4::6, 1] = -3.4e38
    log_decay[1, :, 2] = -1e-8
    args = args._replace(log_decay=log_decay)
    result = run(args, form)
    assert_close(result, direct(args), GRADIENT)
    np.testing.assert_array_equal(np.asarray(result.grads.log_decay)[0, 3::4, 1], 0.0)


def test_two_halves_make_the_whole(form: dict[str, Any]):
    x, log_decay, start = (jnp.asarray(a) for a in inputs(2, 19))

    @jax.jit
    def both(x: jax.Array, log_decay: jax.Array) -> Any:
        head, state = gated_scan(x[:, :7], log_decay[:, :7], initial_state=start, **form)
        tail, state = gated_scan(x[:, 7:], log_decay[:, 7:], initial_state=state, **form)
        whole = gated_scan(x, log_decay, initial_state=start, **form)
        return (jnp.concatenate([head, tail], axis=1), state), tuple(whole)

    parts, whole = both(x, log_decay)
    assert_close(parts, whole, FORWARD)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_keep_a_float32_state(form: dict[str, Any], dtype: Any):
    args = inputs(2, 19)
    args = args._replace(x=jnp.asarray(args.x, dtype))
    result = run(args, form)
    expected = direct(args)
    assert (result.h.dtype, result.final.dtype) == (dtype, np.float32)
    assert (result.grads.x.dtype, result.grads.log_decay.dtype) == (dtype, np.float32)
    assert_close(result.final, expected.final, FORWARD)
    assert_close(result, expected, BFLOAT16)


ARGS = Inputs(*(jnp.asarray(a) for a in inputs(2, 9)))


def loss(x: Any, log_decay: Any = ARGS.log_decay, implementation: str = "pallas") -> jax.Array:
    config = SPLIT if implementation == "pallas" else None
    h, final = gated_scan(x, log_decay, implementation=implementation, config=config)
    return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(final))


def test_transformations():
    """Vmap, scan and checkpoint together; jit and grad are in every other test."""

    def transformed(xs: jax.Array, log_decay: jax.Array, implementation: str) -> jax.Array:
        @jax.checkpoint
        def run(x: jax.Array) -> jax.Array:
            return loss(x, log_decay, implementation)

        def step(total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = jnp.sum(jax.vmap(run)(x))
            return total + value, value

        total, values = jax.lax.scan(step, jnp.float32(0), xs)
        return total + jnp.sum(values**2)

    x = ARGS.x
    xs = jnp.stack([x, 2 * x, x - 1, -x]).reshape(2, 2, *x.shape)
    grad = jax.jit(jax.value_and_grad(transformed, argnums=(0, 1)), static_argnums=2)
    results = [grad(xs, ARGS.log_decay, name) for name in ("pallas", "xla")]
    assert_close(results[0], results[1], GRADIENT)


def test_shard_map():
    mesh = make_mesh((2,), ("batch",), jax.devices()[:2])
    part = jax.sharding.PartitionSpec("batch")

    def grads(x: jax.Array, log_decay: jax.Array) -> jax.Array:
        return jax.grad(loss)(x, log_decay)

    sharded = jax.shard_map(
        grads, mesh=mesh, in_specs=(part, part), out_specs=part, check_vma=False
    )
    args = (ARGS.x, ARGS.log_decay)
    assert_close(jax.jit(sharded)(*args), jax.jit(grads)(*args), FORWARD)


def test_second_derivatives():
    def twice(x: jax.Array, implementation: str) -> jax.Array:
        grad = jax.grad(loss)(x, implementation=implementation)
        return jnp.sum(grad**2)

    got, want = (
        jax.jit(jax.grad(twice), static_argnums=1)(ARGS.x, f) for f in ("xla", "reference")
    )
    assert_close(got, want, GRADIENT)
    with pytest.raises(KernelUnsupported, match=r"first derivatives only.*implementation='xla'"):
        jax.grad(twice)(ARGS.x, "pallas")


def test_a_kernel_refuses_a_block_that_is_no_power_of_two():
    with pytest.raises(KernelUnsupported, match="block=48, which is no power of two"):
        gated_scan(*ARGS[:2], implementation="pallas", config=GatedScanConfig(block=48))


def test_no_float64_kernel():
    with jax.enable_x64(True), pytest.raises(KernelUnsupported, match="float32, not float64"):
        gated_scan(jnp.zeros((1, 4, 2), jnp.float64), jnp.zeros((1, 4, 2)), implementation="pallas")


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)])
def test_no_row_and_no_token(shape: tuple[int, ...]):
    x, start = jnp.zeros(shape), jnp.ones((shape[0], 2))
    ids = jnp.ones(shape[:2], jnp.int32)
    for name in ("xla", "reference", "pallas"):
        out = gated_scan(x, x, initial_state=start, segment_ids=ids, implementation=name)
        assert out.h.shape == shape
        np.testing.assert_array_equal(out.state, start)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 2), (1, 4, 1), (1, 2)), r"log_decay has shape \(1, 4, 1\).*shape \(1, 4, 2\)"),
        (((1, 4, 2), (1, 4, 2), (2, 1)), r"initial_state has shape \(2, 1\).*shape \(1, 2\)"),
        (((1, 3, 0), (1, 3, 0), (1, 0)), r"an axis of x \(1, 3, 0\) is empty"),
    ],
)
def test_shapes(shapes: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x, log_decay, start = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ShapeError, match=message):
        gated_scan(x, log_decay, initial_state=start)
