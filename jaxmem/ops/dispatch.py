"""Choice between the implementations of an op: `auto` says why, a named one runs or raises.

`auto` takes the first implementation that can run, in the order in which the op declares them; a
kernel that would only be interpreted is never taken. `use_implementation` or the environment
variable JAXMEM_IMPLEMENTATION replace `auto` everywhere; what a call names itself stays.
"""

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import jax

from jaxmem.errors import KernelUnsupported, unknown_name
from pallas_kernels._interpret import on_cpu

Implementation = Literal["auto", "reference", "xla", "pallas", "cudnn"]
Unmet = Callable[..., str | None]
"""From the operands and options of a call to the condition it does not meet, or None."""

VARIABLE = "JAXMEM_IMPLEMENTATION"
KERNELS = ("pallas", "cudnn")

_OPS: dict[str, dict[str, Unmet | None]] = {}
# A user context is part of the keys of jit's caches, so the choice cannot leak between contexts.
_override = jax.make_user_context(None)


class Rejected(NamedTuple):
    """An implementation that would not run, and why."""

    implementation: str
    reason: str


class Choice(NamedTuple):
    """What would run for an op, and why."""

    op: str
    implementation: str
    reason: str
    rejected: tuple[Rejected, ...] = ()
    """What `auto` would have preferred."""


def declare(op: str, **candidates: Unmet | None) -> None:
    """Announce an op and its implementations, the one that `auto` prefers first.

    Each comes with a function of the operands and options of a call that says which condition the
    call does not meet, or None where nothing can be wrong.
    """
    _OPS[op] = candidates


def implementations(op: str) -> tuple[str, ...]:
    """Return the implementations of an op, the preferred one first."""
    return tuple(_candidates(op))


@contextlib.contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Let `auto` mean the named implementation in all ops that are traced inside.

    Raises:
      UnknownName: no such implementation.
    """
    with _override(_known(name)):
        yield


def explain(
    op: str, *operands: Any, implementation: Implementation = "auto", **options: Any
) -> Choice:
    """Say which implementation of `op` a call runs, and why not the ones before it.

    Args:
      op: name of the op.
      operands: arrays or `jax.ShapeDtypeStruct`s of the call; none: what holds for most calls.
      implementation: what the call asks for.
      options: the other arguments of the call that matter to its choice, by name.

    Raises:
      UnknownName: no such op or implementation name.
      KernelUnsupported: the named implementation cannot run this call.
    """
    candidates = _candidates(op)
    if _known(implementation) != "auto":
        return _named(op, implementation, "asked for by name", operands, options)
    override = _override.value or os.environ.get(VARIABLE) or "auto"
    if _known(override) != "auto":
        source = "use_implementation" if _override.value else VARIABLE
        return _named(op, override, f"set by {source}", operands, options)
    rejected = []
    for name, unmet in candidates.items():
        why = _unmet(unmet, operands, options)
        if why is None and name in KERNELS and on_cpu():
            why = "no GPU here, where a kernel would only be interpreted"
        if why is None:
            return Choice(op, name, _reason(rejected), tuple(rejected))
        rejected.append(Rejected(name, why))
    raise KernelUnsupported(f"{op}: {_reason(rejected)}. Nothing is left that could run.")


def resolve(op: str, implementation: Implementation, *operands: Any, **options: Any) -> str:
    """Return the name of the implementation that runs; see `explain` for the errors."""
    choice = explain(op, *operands, implementation=implementation, **options)
    return choice.implementation


def explain_all() -> list[str]:
    """Describe, a line per op loaded in this process, what `auto` runs and why."""
    choices = (explain(op) for op in sorted(_OPS))
    return [f"{c.op}: {c.implementation} ({c.reason})" for c in choices]


def _candidates(op: str) -> dict[str, Unmet | None]:
    if op not in _OPS:
        _load_ops()
    if op not in _OPS:
        raise unknown_name("op", op, _OPS)
    return _OPS[op]


@cache
def _load_ops() -> None:
    """Import every op, so that `explain` knows also those that nobody has used yet."""
    package = importlib.import_module("jaxmem.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"jaxmem.ops.{module.name}")


def _known(name: str) -> str:
    if name not in get_args(Implementation):
        raise unknown_name("implementation", name, get_args(Implementation))
    return name


def _named(
    op: str, name: str, reason: str, operands: tuple[Any, ...], options: dict[str, Any]
) -> Choice:
    candidates = _candidates(op)
    if name not in candidates:
        raise KernelUnsupported(
            f"{op} has no implementation {name!r}. It has {', '.join(candidates)}. "
            f"Use one of these, or 'auto'."
        )
    why = _unmet(candidates[name], operands, options)
    if why is not None:
        raise KernelUnsupported(
            f"{op} cannot run implementation {name!r}: {why}. "
            f"Use 'auto', or one of {', '.join(n for n in candidates if n != name)}."
        )
    if name in KERNELS and on_cpu():
        reason += "; interpreted, as there is no GPU here"
    return Choice(op, name, reason)


def _unmet(unmet: Unmet | None, operands: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    return None if unmet is None or not operands else unmet(*operands, **options)


def _reason(rejected: list[Rejected]) -> str:
    if not rejected:
        return "the preferred implementation"
    return "; ".join(f"not {name}: {why}" for name, why in rejected)
