"""Choice between the implementations of an op: `auto` says why, a named one runs or raises."""

from typing import Literal, NamedTuple, get_args

from jaxmem.errors import KernelUnsupported, unknown_name

Implementation = Literal["auto", "reference", "xla", "pallas"]


class Choice(NamedTuple):
    """What would run for an op, and why."""

    op: str
    implementation: str
    reason: str


_OPS: dict[str, tuple[str, ...]] = {}


def declare(op: str, *implementations: str) -> None:
    """Announce an op and the implementations it has, the one that `auto` prefers first."""
    _OPS[op] = implementations


def implementations(op: str) -> tuple[str, ...]:
    """Return the implementations of an op, the preferred one first."""
    if op not in _OPS:
        raise unknown_name("op", op, _OPS)
    return _OPS[op]


def explain(op: str, implementation: Implementation = "auto") -> Choice:
    """Say which implementation of `op` a call runs.

    Raises:
      UnknownName: no such op or implementation name.
      KernelUnsupported: the named implementation does not exist for this op.
    """
    available = implementations(op)
    if implementation not in get_args(Implementation):
        raise unknown_name("implementation", implementation, get_args(Implementation))
    if implementation == "auto":
        missing = "" if "pallas" in available else "; it has no GPU kernel yet"
        return Choice(op, available[0], f"the preferred implementation of this op{missing}")
    if implementation not in available:
        raise KernelUnsupported(
            f"{op} has no implementation {implementation!r}. It has {', '.join(available)}. "
            f"Use one of these, or 'auto'."
        )
    return Choice(op, implementation, "asked for by name")


def resolve(op: str, implementation: Implementation = "auto") -> str:
    """Return the name of the implementation that runs; see `explain` for the errors."""
    return explain(op, implementation).implementation


def explain_all() -> list[str]:
    """Describe, a line per op loaded in this process, what `auto` runs and why."""
    choices = (explain(op) for op in sorted(_OPS))
    return [f"{c.op}: {c.implementation} ({c.reason})" for c in choices]
