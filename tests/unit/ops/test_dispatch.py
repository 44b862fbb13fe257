"""The choice between implementations, and what is said about it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

import jaxmem.ops.attention
import jaxmem.ops.leaky_average
import jaxmem.ops.persistent_read  # noqa: F401
from jaxmem.errors import KernelUnsupported, UnknownName
from jaxmem.ops import dispatch
from jaxmem.ops.dispatch import (
    VARIABLE,
    declare,
    explain,
    explain_all,
    implementations,
    resolve,
    use_implementation,
)
from pallas_kernels._compat import stand_in_gpu

OPS = ("attention", "leaky_average", "persistent_read")


def narrow_only(q: jax.Array, *, wide: bool = False) -> str | None:
    return None if q.shape[-1] <= 4 and not wide else f"width {q.shape[-1]} is more than 4"


@pytest.fixture
def shiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op whose kernel takes narrow heads only."""
    monkeypatch.setattr(dispatch, "_OPS", {})
    monkeypatch.delenv(VARIABLE, raising=False)
    declare("shiny", pallas=narrow_only, xla=None, reference=None)
    return "shiny"


@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_xla_on_a_cpu_and_has_a_reference(op: str):
    assert "reference" in implementations(op)
    assert resolve(op, "auto") == "xla"


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
        assert resolve(shiny, "auto") == "xla"
        assert resolve(shiny, "reference") == "reference"
    assert resolve(shiny, "auto") == "reference"
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(UnknownName, match="fastest"):
        resolve(shiny, "auto")


def test_the_context_is_part_of_what_jit_remembers(shiny: str):
    traced = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        traced.append(resolve(shiny, "auto"))
        return x

    f(1.0)
    with use_implementation("reference"):
        f(1.0)
    f(1.0)
    assert traced == ["xla", "reference"]


def test_explain_all_has_one_line_per_op():
    lines = explain_all()
    named = [line.partition(":")[0] for line in lines]
    assert named == sorted(named)
    assert set(OPS) <= set(named)
    assert all(line.startswith(f"{op}: xla (") for op, line in zip(named, lines, strict=True))


def test_unknown_names():
    with pytest.raises(UnknownName, match=r"Unknown op 'attentionn'\. Did you mean attention"):
        implementations("attentionn")
