"""What the scans promise beside numbers: what they take, what they return, what runs where."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import DTypeError
from jaxmem.ops.dispatch import explain
from jaxmem.ops.gated_scan import GatedScanOutput, gated_scan
from jaxmem.ops.leaky_average import LeakyOutput, LeakyState, leaky_average
from jaxmem.ops.weighted_average import WeightedOutput, WeightedState, weighted_average
from pallas_kernels._compat import lower_for_cuda, stand_in_gpu
from tests.helpers.compare import FORWARD, assert_close
from tests.helpers.lowering import kernel_names

X = np.random.default_rng(0).normal(size=(2, 17, 2, 4))
FLAT, STATE = X[:, :, 0], X[:, 0]
IDS = np.repeat([[1], [2]], 17, axis=1)
Case = tuple[Callable[..., Any], type, tuple[np.ndarray, ...], Any]
CASES: dict[str, Case] = {
    "leaky_average": (leaky_average, LeakyOutput, (X, np.ones(2)), LeakyState(STATE, None)),
    "gated_scan": (gated_scan, GatedScanOutput, (FLAT, -np.abs(FLAT)), FLAT[:, 0]),
    "weighted_average": (
        weighted_average,
        WeightedOutput,
        (X, X, -np.abs(X)),
        WeightedState(STATE, STATE),
    ),
}


@functools.cache
def in_float64(op: str) -> Any:
    """Return what the arrays give in their own precision."""
    call, _, operands, state = CASES[op]
    run = jax.jit(functools.partial(call, implementation="xla"))
    with jax.enable_x64(True):
        return run(*operands, initial_state=state, segment_ids=IDS, initial_segment=IDS[:, 0])


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas"])
@pytest.mark.parametrize("op", CASES)
def test_arrays_of_numpy_are_taken_as_jax_would_take_them(
    op: str, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """Float64 arrays would warn wherever they are cast, and a warning fails a test."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, output, operands, state = CASES[op]
    given = {"initial_state": state, "segment_ids": IDS, "initial_segment": IDS[:, 0]}
    options = {"implementation": implementation, "interpret": True}
    # Constants of a program, which the op itself converts.
    found = jax.jit(lambda: call(*operands, **given, **options))()
    assert isinstance(found, output)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    assert_close(found, in_float64(op), FORWARD)


@pytest.mark.parametrize("name", ["segment_ids", "initial_segment"])
@pytest.mark.parametrize("op", CASES)
def test_numbers_of_documents_are_integers(op: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, _, operands, _ = CASES[op]
    documents = {"segment_ids": IDS, "initial_segment": IDS[:, 0]}
    documents[name] = documents[name].astype(np.float32)
    with pytest.raises(DTypeError, match=f"{op}: {name} is float32, where integers are expected"):
        jax.eval_shape(lambda: call(*operands, **documents))


@pytest.mark.parametrize("op", CASES)
def test_few_tokens_take_no_kernel_unless_it_is_named(op: str):
    call, _, operands, _ = CASES[op]
    for length, kernels in ((16, 0), (17, 1)):
        shapes = (a.shape if a.ndim == 1 else (2, length, *a.shape[2:]) for a in operands)
        short = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        with stand_in_gpu():
            choice = explain(op, *short)
        assert choice.implementation == ("pallas" if kernels else "xla")
        assert ("this call has 16 tokens" in choice.reason) == (not kernels)
        assert len(kernel_names(lower_for_cuda(call, *short))) == kernels
        if not kernels:
            named = functools.partial(call, implementation="pallas")
            assert len(kernel_names(lower_for_cuda(named, *short))) == 1


@pytest.mark.parametrize("op", CASES)
def test_beside_a_gpu_code_on_a_cpu_runs_the_form_of_a_cpu(op: str):
    """Its numbers are compared in `test_transforms.py`."""
    call, _, operands, _ = CASES[op]
    arrays = tuple(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands)

    def run(*operands: jax.Array) -> Any:
        return call(*operands, segment_ids=jnp.asarray(IDS))

    with stand_in_gpu():
        lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()
    assert "triton" not in lowered
    assert "stablehlo.while" in lowered  # a step per token
