"""What the scans promise beside numbers: what they take, what they return, what runs where."""

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
from tests.helpers.compare import GRADIENT, assert_close
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


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas"])
@pytest.mark.parametrize("op", CASES)
def test_arrays_of_numpy_are_taken_as_jax_would_take_them(
    op: str, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """Float64 arrays would warn wherever they are cast, and a warning fails a test."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, output, operands, state = CASES[op]
    options = {"implementation": implementation, "interpret": True}
    given = {"initial_state": state, "segment_ids": IDS, "initial_segment": IDS[:, 0]}
    found = call(*operands, **given, **options)
    as_jax = jax.tree.map(jnp.asarray, (operands, given))
    expected = call(*as_jax[0], **as_jax[1], **options)
    assert isinstance(found, output)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["segment_ids", "initial_segment"])
@pytest.mark.parametrize("op", CASES)
def test_numbers_of_documents_are_integers(op: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, _, operands, _ = CASES[op]
    documents = {"segment_ids": IDS, "initial_segment": IDS[:, 0]}
    documents[name] = documents[name].astype(np.float32)
    with pytest.raises(DTypeError, match=f"{op}: {name} is float32, where integers are expected"):
        call(*operands, **documents)


@pytest.mark.parametrize("op", CASES)
def test_few_tokens_take_no_kernel_unless_it_is_named(op: str):
    call, _, operands, _ = CASES[op]
    for length, kernels in ((16, 0), (17, 1)):
        short = tuple(jnp.asarray(a if a.ndim == 1 else a[:, :length]) for a in operands)
        with stand_in_gpu():
            choice = explain(op, *short)
        assert choice.implementation == ("pallas" if kernels else "xla")
        assert ("this call has 16 tokens" in choice.reason) == (not kernels)
        assert len(kernel_names(lower_for_cuda(call, *short))) == kernels

        def named(*operands: jax.Array) -> Any:
            return call(*operands, implementation="pallas")

        assert len(kernel_names(lower_for_cuda(named, *short))) == 1


@pytest.mark.parametrize("op", CASES)
def test_beside_a_gpu_code_on_a_cpu_runs_the_form_of_a_cpu(op: str):
    call, _, operands, _ = CASES[op]
    arrays = tuple(jnp.asarray(a, jnp.float32) for a in operands)

    def run(*operands: jax.Array) -> Any:
        def scalar(implementation: str, *operands: jax.Array) -> Any:
            outputs = call(*operands, segment_ids=jnp.asarray(IDS), implementation=implementation)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))

        grad = jax.value_and_grad(scalar, tuple(range(1, 1 + len(operands))))
        return [grad(implementation, *operands) for implementation in ("auto", "xla")]

    expected = jax.jit(run)(*arrays)
    with stand_in_gpu():
        traced = jax.jit(lambda *operands: run(*operands)).trace(*arrays)
        lowered = traced.lower(lowering_platforms=("cpu",))
        found = lowered.compile()(*arrays)
    assert "triton" not in lowered.as_text()
    assert "stablehlo.while" in lowered.as_text()  # a step per token
    assert_close(found, expected, GRADIENT)
