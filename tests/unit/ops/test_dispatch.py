"""The choice between implementations, and what is said about it."""

import pytest

import jaxmem.ops.attention
import jaxmem.ops.leaky_average
import jaxmem.ops.persistent_read  # noqa: F401
from jaxmem.errors import KernelUnsupported, UnknownName
from jaxmem.ops.dispatch import Choice, declare, explain, explain_all, implementations, resolve

OPS = ("attention", "leaky_average", "persistent_read")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_prefers_xla(op: str):
    assert implementations(op) == ("xla", "reference")
    assert resolve(op) == "xla"
    assert "no GPU kernel" in explain(op).reason


def test_a_named_implementation_runs_because_it_was_named():
    assert explain("attention", "reference") == Choice(
        "attention", "reference", "asked for by name"
    )


def test_a_kernel_is_preferred_once_it_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxmem.ops.dispatch._OPS", {})
    declare("shiny", "pallas", "xla", "reference")
    choice = explain("shiny")
    assert choice.implementation == "pallas"
    assert "no GPU kernel" not in choice.reason
    assert explain_all() == [f"shiny: pallas ({choice.reason})"]


def test_explain_all_has_one_line_per_op():
    lines = explain_all()
    named = [line.partition(":")[0] for line in lines]
    assert named == sorted(named)
    assert set(OPS) <= set(named)
    assert all(line.startswith(f"{op}: xla (") for op, line in zip(named, lines, strict=True))


def test_errors():
    with pytest.raises(UnknownName, match=r"Unknown op 'attentionn'\. Did you mean attention"):
        implementations("attentionn")
    with pytest.raises(KernelUnsupported, match=r"'pallas'.*It has xla, reference.*'auto'"):
        resolve("attention", "pallas")
