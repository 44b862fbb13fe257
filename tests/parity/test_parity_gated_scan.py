"""Every form of the gated scan against float64 loops; kernels are interpreted.

A form is compiled once for each set of shapes: all else, documents too, is data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops import gated_scan as op
from jaxmem.ops.gated_scan import GatedScanOutput, gated_scan
from pallas_kernels._compat import make_mesh
from pallas_kernels.gated_scan import GatedScanConfig
from pallas_kernels.gated_scan.launch import layout
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close
from tests.helpers.leaky_average import IDS, LENGTH, Documents, documents_at, first_documents
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
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of each form; the tree is what runs off the CPU."""
    use(request.param, monkeypatch)
    return request.param


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "tree":
        elsewhere_only(monkeypatch, op)


def inputs(batch: int, length: int, width: int = 3) -> Inputs:
    draw = np.random.default_rng(length)
    x = draw.normal(size=(batch, length, width))
    log_decay = -draw.exponential(0.5, size=(batch, length, width))
    start = draw.normal(size=(batch, width))
    return Inputs(*(a.astype(np.float32) for a in (x, log_decay, start)))


def waves(array: Any) -> np.ndarray:
    return np.cos(np.arange(array.size)).reshape(array.shape).astype(np.float32)


def direct(args: Inputs, documents: Documents | None = None) -> Result:
    """Run the recurrence and its adjoint over the real tokens of every row, in float64."""
    ids, initial = documents or (np.ones(args.x.shape[:2], int), np.ones(len(args.x), int))
    x, log_decay, start = (np.asarray(a, np.float64) for a in args)
    gates, g, g_final = np.exp(log_decay), waves(x), waves(start)
    h, final = np.zeros_like(x), start.copy()
    grads = Inputs(np.zeros_like(x), np.zeros_like(x), np.zeros_like(start))
    for row in range(len(x)):
        names, document, before = ids[row], initial[row], []
        real = np.flatnonzero(names)
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


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """Return outputs and gradients of their weighted sum; documents and weights are data too."""

    def run(args: Inputs, documents: Documents | None, weights: tuple[Any, Any]) -> Any:
        ids, initial = documents or (None, None)
        packed = {"segment_ids": ids, "initial_segment": initial}

        def call(args: Inputs) -> GatedScanOutput:
            x, log_decay, start = args
            return gated_scan(x, log_decay, initial_state=start, **packed, **FORMS[name])

        out, pull = jax.vjp(call, args)
        weights = jax.tree.map(lambda g, a: g.astype(a.dtype), GatedScanOutput(*weights), out)
        return Result(*out, *pull(weights))

    return jax.jit(run)


def run(name: str, args: Inputs, documents: Documents | None = None) -> Result:
    return compiled(name)(args, documents, (waves(args.x), waves(args.start)))


@pytest.mark.parametrize(
    ("length", "width", "name"),
    [
        (1, 70, "whole"),  # two blocks of channels
        (24, 16, "whole"),
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
    assert_close(run(name, args), direct(args), GRADIENT)


def test_time_is_split():
    assert layout(SPLIT, (2, 23, 40)).splits == 4
    assert layout(WHOLE, (2, 23, 40)).splits == 1
    assert layout(GatedScanConfig(), (8, 2048, 1024)).splits == 8
    assert layout(GatedScanConfig(), (64, 2048, 1024)).splits == 1


FIRST = Documents(IDS, first_documents(IDS))
ANOTHER = Documents(IDS, np.array([9, 5, 2, 3, 3, 9], np.int32))


@pytest.mark.parametrize("documents", [FIRST, ANOTHER], ids=["first document", "another"])
def test_segments(form: str, documents: Documents):
    args = inputs(len(IDS), LENGTH)
    result = run(form, args, documents)
    assert_close(result, direct(args, documents), GRADIENT)
    for leaf in (result.h, result.grads.x, result.grads.log_decay):
        np.testing.assert_array_equal(np.asarray(leaf)[IDS == 0], 0.0)
    np.testing.assert_array_equal(result.final[-1], args.start[-1])  # the row of padding


def test_nothing_in_padding_reaches_real_tokens(form: str):
    args = inputs(len(IDS), LENGTH)
    padding = (IDS == 0)[..., None]
    nan = args._replace(
        x=np.where(padding, np.float32(np.nan), args.x),
        log_decay=np.where(padding, np.float32(np.nan), args.log_decay),
    )
    assert_close(run(form, nan, FIRST), direct(args, FIRST), GRADIENT)


def test_extreme_gates(form: str):
    """Nothing forgotten, everything forgotten, and gates that no float32 exponential can tell."""
    length, width = {"whole": (24, 16), "split": (23, 40)}.get(form, (23, 3))
    args = inputs(2, length, width)
    log_decay = np.array(args.log_decay)
    log_decay[0, :, 0] = 0.0
    log_decay[0, 3::4, 1] = -np.inf
    log_decay[1, 2::3, 1] = -1e4
    log_decay[1, 3::3, 1] = -1e30
    log_decay[1, 4::6, 1] = -3.4e38
    log_decay[1, :, 2] = -1e-8
    args = args._replace(log_decay=log_decay)
    result = run(form, args)
    assert_close(result, direct(args), GRADIENT)
    np.testing.assert_array_equal(np.asarray(result.grads.log_decay)[0, 3::4, 1], 0.0)


def test_two_halves_make_the_whole(form: str):
    """Each half is padding in the call of the other."""
    args = inputs(len(IDS), LENGTH)
    early, late = documents_at(17, ANOTHER.initial)
    head = run(form, args, early)
    tail = run(form, args._replace(start=head.final), late)
    whole = run(form, args, ANOTHER)
    assert_close((head.h + tail.h, tail.final), (whole.h, whole.final), FORWARD)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("whole", jnp.bfloat16),
        ("split", jnp.float16),
        ("steps", jnp.bfloat16),
        ("tree", jnp.float16),
        ("reference", jnp.bfloat16),
    ],
)
def test_half_precision_inputs_keep_a_float32_state(
    name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
):
    use(name, monkeypatch)
    args = inputs(2, 19)
    args = args._replace(x=args.x.astype(dtype))
    result = run(name, args)
    expected = direct(args)
    assert (result.h.dtype, result.final.dtype) == (dtype, np.float32)
    assert (result.grads.x.dtype, result.grads.log_decay.dtype) == (dtype, np.float32)
    assert_close(result.final, expected.final, FORWARD)
    assert_close(result, expected, BFLOAT16)


ARGS = inputs(2, 9)


def loss(x: Any, log_decay: Any, implementation: str = "pallas") -> jax.Array:
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
    xs = np.stack([x, 2 * x, x - 1, -x]).reshape(2, 2, *x.shape)
    grad = jax.jit(jax.value_and_grad(transformed, argnums=(0, 1)), static_argnums=2)
    results = [grad(xs, ARGS.log_decay, name) for name in ("pallas", "xla")]
    assert_close(results[0], results[1], GRADIENT)


def test_shard_map():
    mesh = make_mesh((2,), ("batch",), jax.devices()[:2])
    part = jax.sharding.PartitionSpec("batch")
    sharded = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(part, part), out_specs=part, check_vma=False
    )
    found, expected = (jax.jit(run)(ARGS.x, ARGS.log_decay) for run in (sharded, jax.grad(loss)))
    assert_close(found, expected, FORWARD)


def test_second_derivatives_of_a_kernel_are_refused():
    def once(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(loss)(x, jnp.asarray(ARGS.log_decay)) ** 2)

    with pytest.raises(KernelUnsupported, match=r"first derivatives only.*implementation='xla'"):
        jax.eval_shape(jax.grad(once), ARGS.x)


def test_a_kernel_refuses_a_block_that_is_no_power_of_two():
    run = functools.partial(gated_scan, implementation="pallas", config=GatedScanConfig(block=48))
    with pytest.raises(KernelUnsupported, match="block=48, which is no power of two"):
        jax.eval_shape(run, *ARGS[:2])


def test_no_float64_kernel():
    run, x = functools.partial(gated_scan, implementation="pallas"), np.zeros((1, 4, 2))
    with jax.enable_x64(True), pytest.raises(KernelUnsupported, match="float32, not float64"):
        jax.eval_shape(run, x, np.float32(x))


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)])
def test_no_row_and_no_token(shape: tuple[int, ...]):
    x, start = np.zeros(shape, np.float32), np.ones((shape[0], 2), np.float32)

    @jax.jit
    def run(x: Any, start: Any, ids: Any) -> list[GatedScanOutput]:
        call = functools.partial(gated_scan, x, x, initial_state=start, segment_ids=ids)
        return [call(implementation=name) for name in ("xla", "reference", "pallas")]

    for out in run(x, start, np.ones(shape[:2], np.int32)):
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
    x, log_decay, start = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ShapeError, match=message):
        jax.eval_shape(lambda *a: gated_scan(*a[:2], initial_state=a[2]), x, log_decay, start)
