"""The choice between implementations, and what is said about it."""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec

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
from pallas_kernels import _compat
from pallas_kernels._compat import Target, make_mesh, stand_in_gpu


def filled(value: float, *shape: int) -> jax.Array:
    """Return an array without compiling what fills it."""
    return jnp.asarray(np.full(shape, value, np.float32))


X = filled(1.0, 2, 17, 2, 16)  # more tokens than count as decoding
FLAT, PER_HEAD = filled(1.0, 2, 17, 16), filled(1.0, 2)
WEIGHTS = filled(1.0, 2, 17, 2, 1)
DECAYS, HEAD_DECAYS, FLAT_DECAYS, GATES = (
    filled(-1.0, 2, 17, *rest) for rest in ((2, 16), (2, 1), (16,), (2,))
)
TABLE = filled(1.0, 1, 2, 7, 16)
IDS = jnp.asarray(np.ones((2, 17), np.int32))
NARROW = jax.ShapeDtypeStruct((2, 4), jnp.float32)
WIDE = jax.ShapeDtypeStruct((2, 8), jnp.float32)
LINEAR_STATE = init_linear_state(2, 2, 16, 16, with_total=False)
DROPOUT = Dropout(0.1, jax.random.key(0))
CALLS: dict[str, list[tuple[Any, tuple, dict[str, Any]]]] = {
    "attention": [
        (attention, (X, X, X), {"scale": 0.5}),
        (attention, (X, X, X), {"scale": 0.5, "segment_ids": IDS, "window": 3, "lag": 1}),
        (attention, (X, X, X), {"scale": PER_HEAD, "places": Places(*(IDS,) * 4)}),
        (attention, (X, X, X), {"scale": 0.5, "dropout": DROPOUT, "precision": "high"}),
    ],
    "gated_scan": [
        (gated_scan, (FLAT, FLAT_DECAYS), {}),
        (
            gated_scan,
            (FLAT, FLAT_DECAYS),
            {"initial_state": filled(1.0, 2, 16), "segment_ids": IDS},
        ),
    ],
    "leaky_average": [
        (leaky_average, (X, PER_HEAD), {"scaling": "scaled", "chunk_size": 4}),
        (
            leaky_average,
            (X, PER_HEAD),
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
            {"log_decay": GATES, "initial_state": LINEAR_STATE, "segment_ids": IDS},
        ),
    ],
    "persistent_read": [
        (persistent_read, (X, TABLE, TABLE), {"scale": 0.5}),
        (persistent_read, (X, TABLE, TABLE), {"scale": PER_HEAD, "dropout": DROPOUT}),
    ],
    "squared_attention": [
        (squared_attention, (X, X, X), {"with_total": True}),
        (squared_attention, (X, X, X), {"log_decay": GATES, "segment_ids": IDS}),
    ],
    "weighted_average": [
        (weighted_average, (X, X, DECAYS), {"bonus": filled(1.0, 2, 16)}),
        (
            weighted_average,
            (X, WEIGHTS, HEAD_DECAYS),
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
    choice = explain(shiny, NARROW)
    assert choice.implementation == "xla"
    assert choice.rejected[0].implementation == "pallas"
    assert "no GPU here" in choice.reason


def test_auto_takes_the_kernel_on_a_gpu_where_its_conditions_are_met(shiny: str):
    with stand_in_gpu("NVIDIA H200"):
        assert explain(shiny, NARROW).implementation == "pallas"
        wide = explain(shiny, WIDE)
        told = explain(shiny, NARROW, wide=True)
    assert (wide.implementation, told.implementation) == ("xla", "xla")
    assert wide.reason == "not pallas: width 8 is more than 4"


def test_a_named_implementation_runs_because_it_was_named(shiny: str):
    choice = explain(shiny, NARROW, implementation="pallas")
    assert choice.implementation == "pallas"
    assert choice.reason == "asked for by name; interpreted, as there is no GPU here"


def test_a_named_implementation_raises_where_it_cannot_run(shiny: str):
    with pytest.raises(KernelUnsupported, match=r"shiny cannot run .*'pallas': width 8 is more"):
        resolve(shiny, "pallas", WIDE)
    with pytest.raises(KernelUnsupported, match=r"'cudnn'.*It has pallas, xla, reference.*'auto'"):
        resolve(shiny, "cudnn")


def test_what_is_recommended_can_run(shiny: str):
    with pytest.raises(KernelUnsupported, match=r"Use 'auto', or one of xla, reference\.$"):
        resolve(shiny, "pallas", WIDE)
    declare(dispatch._OPS[shiny].call, cudnn=lambda q: "no", pallas=narrow_only, xla=None)
    with pytest.raises(KernelUnsupported, match=r"Use 'auto', or one of xla\.$"):
        resolve(shiny, "cudnn", NARROW)  # a kernel would only be interpreted here
    with (
        stand_in_gpu(),
        pytest.raises(KernelUnsupported, match=r"Use 'auto', or one of pallas, xla\.$"),
    ):
        resolve(shiny, "cudnn", NARROW)


def test_interpretation_is_announced_once(shiny: str):
    dispatch._warn_interpreted.cache_clear()
    with pytest.warns(UserWarning, match="interpreted.*a thousand times slower"):
        resolve(shiny, "pallas", NARROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(shiny, "pallas", NARROW)
        dispatch._warn_interpreted.cache_clear()
        resolve(shiny, "pallas", NARROW, interpret=True)
        with stand_in_gpu():
            resolve(shiny, "pallas", NARROW)


def test_symbolic_sizes_take_no_kernel_and_cannot_crash_the_choice(shiny: str):
    (size,) = jax.export.symbolic_shape("b")
    q = jax.ShapeDtypeStruct((size, 4), jnp.float32)
    with stand_in_gpu():
        choice = explain(shiny, q)
    assert choice.implementation == "xla"
    assert (
        choice.reason == "not pallas: a kernel needs known sizes, and this call has symbolic ones"
    )
    with pytest.raises(KernelUnsupported, match="known sizes"):
        resolve(shiny, "pallas", q)


@pytest.fixture
def gpu_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes itself for one with an H200 as its first device."""
    monkeypatch.setattr(_compat, "_local_gpu", lambda: Target("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.usefixtures("gpu_process")
def test_a_process_with_a_gpu_has_plain_jax_for_its_cpu(shiny: str):
    choice = explain(shiny, NARROW)
    assert (choice.implementation, choice.elsewhere) == ("pallas", "xla")
    assert (choice.kernel, choice.plain) == ("pallas", "xla")
    with jax.default_device(jax.devices("cpu")[0]):
        choice = explain(shiny, NARROW)
    assert (choice.implementation, choice.elsewhere) == ("xla", "pallas")
    assert choice.reason == "not pallas: code runs on the cpu here"
    # What stands on the CPU is computed there.
    placed = jax.device_put(np.ones((2, 4), np.float32), jax.devices("cpu")[0])
    assert explain(shiny, placed).implementation == "xla"
    wide = explain(shiny, WIDE)
    assert (wide.kernel, wide.plain, wide.elsewhere) == (None, "xla", None)
    named = explain(shiny, NARROW, implementation="pallas")
    assert (named.kernel, named.plain) == ("pallas", None)


def sharded(call: Any) -> Any:
    mesh = make_mesh((2,), ("rows",), jax.devices()[:2])
    rows = PartitionSpec("rows")
    return jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


@pytest.mark.parametrize(
    "transform",
    [
        lambda call: call,
        jax.jit,
        lambda call: jax.vmap(call, in_axes=1, out_axes=1),
        lambda call: jax.grad(lambda x: jnp.sum(call(x))),
        sharded,
    ],
    ids=["none", "jit", "vmap", "grad", "shard_map"],
)
@pytest.mark.parametrize("placed", ["gpu", "cpu"])
@pytest.mark.usefixtures("gpu_process")
def test_explain_agrees_with_what_runs_under_transformations(transform: Any, placed: str):
    x = jax.ShapeDtypeStruct((2, 40, 40, 16), jnp.float32)
    device = jax.devices("cpu")[0] if placed == "cpu" else None
    kernel = "pallas" if placed == "gpu" else "xla"

    def call(x: jax.Array) -> jax.Array:
        return leaky_average(x.reshape(-1, 40, 1, 16), jnp.ones(1))[0].reshape(x.shape)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 40, 1, 16), (1,)))
    with jax.default_device(device):
        expected = explain("leaky_average", *shapes)
        with recording_choices() as choices:
            jax.eval_shape(transform(call), x)
    assert {c.implementation for c in choices} == {kernel} == {expected.implementation}


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

    def trace() -> Any:
        with recording_choices() as choices:
            jax.eval_shape(lambda operands: call(*operands, **options), operands)
        return choices[0]

    choice = trace()
    assert explain(op, *operands, **options) == choice
    assert choice.implementation == "xla"
    for name in implementations(op):
        if name not in dispatch.KERNELS:
            assert explain(op, *operands, **options, implementation=name).implementation == name
    with stand_in_gpu():
        choice = trace()
        explained = explain(op, *operands, **options)
    assert (explained, explained.implementation) == (choice, "pallas")


def test_explain_says_what_runs_without_a_trace():
    with recording_choices() as choices:
        jax.block_until_ready(gated_scan(FLAT, FLAT_DECAYS))
    assert choices == [explain("gated_scan", FLAT, FLAT_DECAYS)]


@pytest.mark.parametrize("op", OPS)
def test_explain_takes_no_other_arguments_than_the_call(op: str):
    _, operands, options = CALLS[op][0]
    with pytest.raises(TypeError, match="windows"):
        explain(op, *operands, **options, windows=3)
    with pytest.raises(TypeError, match="missing"):
        explain(op, operands[0])


def test_choices_are_recorded_once_and_not_by_explain(shiny: str):
    with recording_choices() as choices:
        for _ in range(2):
            resolve(shiny, "auto", NARROW)
        explain(shiny, NARROW, implementation="reference")
        resolve(shiny, "reference", NARROW)
    resolve(shiny, "xla", NARROW)
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
