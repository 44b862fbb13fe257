"""The choice between implementations, and what is said about it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from jaxmem.errors import KernelUnsupported, UnknownName
from jaxmem.ops import dispatch
from jaxmem.ops.attention import Dropout, Places, attention
from jaxmem.ops.dispatch import (
    VARIABLE,
    declare,
    explain,
    explain_all,
    implementations,
    recording_choices,
    resolve,
    use_implementation,
)
from jaxmem.ops.gated_scan import gated_scan
from jaxmem.ops.leaky_average import init_leaky_state, leaky_average
from jaxmem.ops.linear_attention import init_linear_state, linear_attention
from jaxmem.ops.persistent_read import persistent_read
from jaxmem.ops.squared_attention import squared_attention
from jaxmem.ops.weighted_average import init_weighted_state, weighted_average
from pallas_kernels._compat import stand_in_gpu

X = jnp.ones((2, 17, 2, 16))  # more tokens than count as decoding
FLAT = jnp.ones((2, 17, 16))
TABLE = jnp.ones((1, 2, 7, 16))
IDS = jnp.ones((2, 17), jnp.int32)
LINEAR_STATE = init_linear_state(2, 2, 16, 16, with_total=False)
DROPOUT = Dropout(0.1, jax.random.key(0))
CALLS: dict[str, list[tuple[Any, tuple, dict[str, Any]]]] = {
    "attention": [
        (attention, (X, X, X), {"scale": 0.5}),
        (attention, (X, X, X), {"scale": 0.5, "segment_ids": IDS, "window": 3, "lag": 1}),
        (attention, (X, X, X), {"scale": jnp.ones(2), "places": Places(*(IDS,) * 4)}),
        (attention, (X, X, X), {"scale": 0.5, "dropout": DROPOUT, "precision": "high"}),
    ],
    "gated_scan": [
        (gated_scan, (FLAT, -FLAT), {}),
        (gated_scan, (FLAT, -FLAT), {"initial_state": jnp.ones((2, 16)), "segment_ids": IDS}),
    ],
    "leaky_average": [
        (leaky_average, (X, jnp.ones(2)), {"scaling": "scaled", "chunk_size": 4}),
        (
            leaky_average,
            (X, jnp.ones(2)),
            {
                "scaling": "normalised",
                "initial_state": init_leaky_state(2, 2, 16, scaling="normalised"),
            },
        ),
    ],
    "linear_attention": [
        (linear_attention, (X, X, X), {"with_total": True}),
        (
            linear_attention,
            (X, X, X),
            {"log_decay": -X[..., 0], "initial_state": LINEAR_STATE, "segment_ids": IDS},
        ),
    ],
    "persistent_read": [
        (persistent_read, (X, TABLE, TABLE), {"scale": 0.5}),
        (persistent_read, (X, TABLE, TABLE), {"scale": jnp.ones(2), "dropout": DROPOUT}),
    ],
    "squared_attention": [
        (squared_attention, (X, X, X), {"with_total": True}),
        (squared_attention, (X, X, X), {"log_decay": -X[..., 0], "segment_ids": IDS}),
    ],
    "weighted_average": [
        (weighted_average, (X, X, -X), {"bonus": jnp.ones((2, 16))}),
        (
            weighted_average,
            (X, X[..., :1], -X[..., :1]),
            {"initial_state": init_weighted_state(2, 2, 16), "segment_ids": IDS},
        ),
    ],
}
OPS = tuple(CALLS)


def narrow_only(q: jax.Array, *, wide: bool = False) -> str | None:
    return None if q.shape[-1] <= 4 and not wide else f"width {q.shape[-1]} is more than 4"


@pytest.fixture
def shiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op whose kernel takes narrow heads only."""
    monkeypatch.setattr(dispatch, "_OPS", {})
    monkeypatch.delenv(VARIABLE, raising=False)

    def shiny(q: jax.Array, *, wide: bool = False, implementation: Any = "auto") -> jax.Array:
        resolve("shiny", implementation, q, wide=wide)
        return q

    declare(shiny, pallas=narrow_only, xla=None, reference=None)
    return "shiny"


@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_xla_on_a_cpu_and_has_a_reference(op: str):
    assert "reference" in implementations(op)
    assert resolve(op, "auto").implementation == "xla"


def test_auto_on_a_cpu_says_what_it_picked_and_why_not_the_kernel(shiny: str):
    choice = explain(shiny, jnp.ones((2, 4)))
    assert choice.implementation == "xla"
    assert choice.rejected[0].implementation == "pallas"
    assert "no GPU here" in choice.reason


def test_auto_takes_the_kernel_on_a_gpu_where_its_conditions_are_met(shiny: str):
    with stand_in_gpu("NVIDIA H200"):
        assert explain(shiny, jnp.ones((2, 4))).implementation == "pallas"
        wide = explain(shiny, jnp.ones((2, 8)))
        told = explain(shiny, jnp.ones((2, 4)), wide=True)
    assert (wide.implementation, told.implementation) == ("xla", "xla")
    assert wide.reason == "not pallas: width 8 is more than 4"


def test_a_named_implementation_runs_because_it_was_named(shiny: str):
    choice = explain(shiny, jnp.ones((2, 4)), implementation="pallas")
    assert choice.implementation == "pallas"
    assert choice.reason == "asked for by name; interpreted, as there is no GPU here"


def test_a_named_implementation_raises_where_it_cannot_run(shiny: str):
    with pytest.raises(KernelUnsupported, match=r"shiny cannot run .*'pallas': width 8 is more"):
        resolve(shiny, "pallas", jnp.ones((2, 8)))
    with pytest.raises(KernelUnsupported, match=r"'cudnn'.*It has pallas, xla, reference.*'auto'"):
        resolve(shiny, "cudnn")


def test_a_context_and_the_environment_replace_auto_only(
    shiny: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(VARIABLE, "reference")
    assert explain(shiny).reason == f"set by {VARIABLE}"
    with use_implementation("xla"):
        assert explain(shiny).reason == "set by use_implementation"
        assert resolve(shiny, "auto").implementation == "xla"
        assert resolve(shiny, "reference").implementation == "reference"
    assert resolve(shiny, "auto").implementation == "reference"
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(UnknownName, match="fastest"):
        resolve(shiny, "auto")


def test_the_context_is_part_of_what_jit_remembers(shiny: str):
    traced = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        traced.append(resolve(shiny, "auto").implementation)
        return x

    f(1.0)
    with use_implementation("reference"):
        f(1.0)
    f(1.0)
    assert traced == ["xla", "reference"]


@pytest.mark.parametrize(
    ("op", "number"), [(op, n) for op, calls in CALLS.items() for n in range(len(calls))]
)
def test_explain_takes_the_arguments_of_the_call_and_says_what_it_does(op: str, number: int):
    call, operands, options = CALLS[op][number]
    with recording_choices() as choices:
        jax.block_until_ready(call(*operands, **options))
    assert explain(op, *operands, **options) == choices[0]
    assert choices[0].implementation == "xla"
    for name in implementations(op):
        if name not in dispatch.KERNELS:
            assert explain(op, *operands, **options, implementation=name).implementation == name

    def fresh(operands: Any) -> Any:
        return call(*operands, **options)

    with stand_in_gpu(), recording_choices() as choices:
        jax.jit(fresh).trace(operands)
        explained = explain(op, *operands, **options)
    assert (explained, explained.implementation) == (choices[0], "pallas")


@pytest.mark.parametrize("op", OPS)
def test_explain_takes_no_other_arguments_than_the_call(op: str):
    _, operands, options = CALLS[op][0]
    with pytest.raises(TypeError, match="windows"):
        explain(op, *operands, **options, windows=3)
    with pytest.raises(TypeError, match="missing"):
        explain(op, operands[0])


def test_choices_are_recorded_once_and_not_by_explain(shiny: str):
    q = jnp.ones((2, 4))
    with recording_choices() as choices:
        for _ in range(2):
            resolve(shiny, "auto", q)
        explain(shiny, q, implementation="reference")
        resolve(shiny, "reference", q)
    resolve(shiny, "xla", q)
    assert [c.implementation for c in choices] == ["xla", "reference"]
    assert choices[1].reason == "asked for by name"


@pytest.mark.parametrize("source", ["use_implementation", VARIABLE])
def test_only_names_of_every_op_can_replace_auto(
    source: str, shiny: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def ask(name: Any) -> None:
        if source == VARIABLE:
            monkeypatch.setenv(VARIABLE, name)
            resolve(shiny, "auto")
        else:
            with use_implementation(name):
                resolve(shiny, "auto")

    message = rf"{source}: cudnn is not .* every op.*attention\(\.\.\., implementation='cudnn'\)"
    with pytest.raises(UnknownName, match=message):
        ask("cudnn")
    with pytest.raises(UnknownName, match=r"'palas'. Did you mean pallas"):
        ask("palas")
    for name in ("auto", "reference", "xla", "pallas"):
        ask(name)


def test_explain_all_has_one_line_per_op():
    lines = explain_all()
    named = [line.partition(":")[0] for line in lines]
    assert named == sorted([*OPS, "polynomial_attention"])  # which has no kernel
    pairs = zip(named, lines, strict=True)
    assert all(line.startswith(f"{op}: xla first, a call may differ (") for op, line in pairs)


def test_unknown_names():
    with pytest.raises(UnknownName, match=r"Unknown op 'attentionn'\. Did you mean attention"):
        implementations("attentionn")
