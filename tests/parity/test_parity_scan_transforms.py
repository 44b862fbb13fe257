"""Scans inside shards and in exports of symbolic sizes, and what is summed up inside other ops.

What every op has in common, and derivatives of scans, are in tests/unit/ops/test_transforms.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmem.ops import decay, leaky_average_xla
from jaxmem.ops import gated_scan as gated_module
from jaxmem.ops import weighted_average as weighted_module
from jaxmem.ops.attention_terms import cumulative
from jaxmem.ops.decay import bounded_decay
from jaxmem.ops.gated_scan import gated_scan
from jaxmem.ops.leaky_average import LeakyState, leaky_average
from jaxmem.ops.segments import spans
from jaxmem.ops.weighted_average import WeightedState, weighted_average
from pallas_kernels._compat import make_mesh
from tests.helpers.compare import FORWARD, GRADIENT, assert_close
from tests.helpers.derivatives import check_modes, derivatives
from tests.helpers.off_cpu import elsewhere_only

IDS = np.array([[0, 3, 3, 0, 3, 1, 1], [2, 2, 5, 5, 5, 0, 2]], np.int32)
ONE = np.ones_like(IDS)
"""One document: the same as none."""
BATCH, LENGTH, HEADS, WIDTH = 2, 7, 2, 3
Case = tuple[Callable[..., Any], tuple[np.ndarray, ...]]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, FLAT = draw(BATCH, LENGTH, HEADS, WIDTH), draw(BATCH, LENGTH, WIDTH)
GATES = -np.abs(draw(BATCH, LENGTH, WIDTH, seed=1))
LOGS = tuple(draw(BATCH, LENGTH, HEADS, 1, seed=seed) for seed in (2, 3))
SUMS, RATE = draw(BATCH, HEADS, WIDTH, seed=4), np.array([0.3, 1.2], np.float32)


def leaky(form: str, ids: Any, x: Any, rate: Any, start: Any) -> Any:
    state = LeakyState(start, None)
    return leaky_average(x, rate, initial_state=state, segment_ids=ids, implementation=form)


def normalised(form: str, ids: Any, x: Any, rate: Any, start: Any) -> Any:
    state = LeakyState(start, jnp.exp(start[..., :1]))
    options = {"scaling": "normalised", "chunk_size": 3, "implementation": form}
    return leaky_average(x, rate, initial_state=state, segment_ids=ids, **options)


def gated(form: str, ids: Any, x: Any, log_decay: Any) -> Any:
    start = jnp.sin(x[:, 0])
    return gated_scan(x, log_decay, initial_state=start, segment_ids=ids, implementation=form)


def weighted(form: str, ids: Any, v: Any, k: Any, w: Any, start: Any) -> Any:
    state = WeightedState(start, start[..., :1])
    options = {"bonus": jnp.sin(k), "segment_ids": ids, "implementation": form}
    return weighted_average(v, k, -jnp.abs(w), initial_state=state, **options)


def excess(form: str, ids: Any, log_decay: Any) -> Any:
    del form
    resets = None if ids is None else spans(ids).reset
    return bounded_decay(log_decay, jnp.zeros_like(log_decay[:, 0]), resets)


def sums(form: str, ids: Any, log_decay: Any) -> Any:
    del form, ids
    return cumulative(log_decay)


CASES: dict[str, Case] = {
    "leaky": (leaky, (X, RATE, SUMS)),
    "normalised": (normalised, (X, RATE, SUMS)),
    "gated": (gated, (FLAT, GATES)),
    "weighted": (weighted, (X, *LOGS, SUMS)),
    "excess": (excess, (FLAT,)),
    "cumulative": (sums, (GATES,)),
}
SCANS = ("leaky", "normalised", "gated", "weighted")
MODULES = (leaky_average_xla, gated_module, weighted_module, decay)


def close(found: Any, expected: Any) -> None:
    assert_close(found, expected, GRADIENT)


@pytest.mark.parametrize("place", ["elsewhere", "cpu"])
@pytest.mark.parametrize("name", ["excess", "cumulative"])
def test_every_derivative(name: str, place: str, monkeypatch: pytest.MonkeyPatch):
    if place == "elsewhere":
        elsewhere_only(monkeypatch, *MODULES)
    call, operands = CASES[name]
    run = jax.jit(lambda ids, *a: derivatives(functools.partial(call, "xla", ids), *a))
    check_modes(run(IDS, *operands), close)


class Found(NamedTuple):
    """Outputs of a call, and derivatives of the sum of their sines."""

    outputs: Any
    grads: tuple[jax.Array, ...]
    slope: jax.Array
    """Along the operands themselves."""


def differentiate(run: Callable[..., Any], operands: tuple[jax.Array, ...]) -> Found:
    @jax.jit  # traced once for both modes
    def scalar(*operands: jax.Array) -> Any:
        outputs = run(*operands)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

    numbers = tuple(range(len(operands)))
    grads, outputs = jax.grad(scalar, numbers, has_aux=True)(*operands)
    return Found(outputs, grads, jax.jvp(scalar, operands, operands, has_aux=True)[1])


@functools.cache
def expected(name: str) -> tuple[Found, Found]:
    """Return what the reference finds without shards, first without documents, then with them."""
    call, operands = CASES[name]
    run = jax.jit(lambda ids, *a: differentiate(functools.partial(call, "reference", ids), a))
    return run(ONE, *operands), run(IDS, *operands)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "xla") for name in CASES),
        *((name, "reference") for name in ("normalised", "gated", "weighted")),
    ],
)
def test_shards_with_the_check_of_varying_axes(name: str, form: str):
    """The reference of the sums is also that of `normalised`; what is inside ops has one form."""
    call, operands = CASES[name]
    mesh = make_mesh((2,), ("rows",), jax.devices()[:2])
    specs = tuple(P() if a.ndim == 1 else P("rows") for a in operands)

    def sharded(ids: jax.Array, *operands: jax.Array) -> Any:
        def both(*operands: jax.Array) -> Any:
            return [call(form, packed, *operands) for packed in (None, ids)]

        found = differentiate(both, operands)
        return found.grads, jax.lax.psum(found.slope, "rows")

    split = jax.shard_map(sharded, mesh=mesh, in_specs=(P("rows"), *specs), out_specs=(specs, P()))
    wanted = [(found.grads, found.slope) for found in expected(name)]
    close(jax.jit(split)(IDS, *operands), jax.tree.map(np.add, *wanted))


def symbolic(array: np.ndarray, sizes: tuple[Any, Any]) -> jax.ShapeDtypeStruct:
    """Return the shape of an array whose rows and tokens, if it has any, are symbols."""
    if array.ndim == 1:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    shape = (sizes[0], sizes[1] if array.shape[1] == LENGTH else array.shape[1], *array.shape[2:])
    return jax.ShapeDtypeStruct(shape, array.dtype)


@pytest.mark.parametrize(
    ("name", "place", "scopes"),
    [
        *((name, "elsewhere", ["rows"]) for name in (*SCANS, "excess")),
        ("excess", "cpu", ["rows", "rows, tokens"]),
    ],
)
def test_exports_of_symbolic_sizes(
    name: str, place: str, scopes: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Trees and chunks want a known number of tokens: with a symbolic one steps run everywhere."""
    # Symbols are no integers to the checks of annotations.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    if place == "elsewhere":
        elsewhere_only(monkeypatch, *MODULES)
    call, operands = CASES[name]

    def run(ids: jax.Array, *operands: jax.Array) -> Any:
        return call("auto", ids, *operands), call("auto", None, *operands)

    wanted = tuple(found.outputs for found in reversed(expected(name)))
    for scope in scopes:
        rows, *tokens = jax.export.symbolic_shape(scope)
        shapes = [symbolic(a, (rows, *(tokens or [LENGTH]))) for a in (IDS, *operands)]
        exported = jax.export.export(jax.jit(run))(*shapes)
        assert_close(exported.call(IDS, *operands), wanted, FORWARD)
