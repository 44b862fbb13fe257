"""Choice between the implementations of an op: `auto` says why, a named one runs or raises.

`auto` takes the first implementation that can run, in the order in which the op declares them; a
kernel that would only be interpreted is never taken. `use_implementation` or the environment
variable JAXMEM_IMPLEMENTATION replace `auto` everywhere; what a call names itself stays.
"""

import contextlib
import contextvars
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from jaxmem.errors import KernelUnsupported, UnknownName, unknown_name
from pallas_kernels._interpret import on_cpu

Shared = Literal["auto", "reference", "xla", "pallas"]
"""Names that every op knows."""
Implementation = Literal[Shared, "cudnn"]
Unmet = Callable[..., str | None]
"""From the operands and options of a call to the condition it does not meet, or None."""

VARIABLE = "JAXMEM_IMPLEMENTATION"
KERNELS = ("pallas", "cudnn")
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


class Slower(str):
    """A condition that only `auto` minds: the implementation runs, but another one is faster."""

    __slots__ = ()


class _Op(NamedTuple):
    """A declared op."""

    call: Callable[..., Any]
    candidates: dict[str, Unmet | None]


_OPS: dict[str, _Op] = {}
# A user context is part of the keys of jit's caches, so the choice cannot leak between contexts.
_override = jax.make_user_context(None)
_record: contextvars.ContextVar[list["Choice"] | None] = contextvars.ContextVar(
    "record", default=None
)


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


def declare(call: Callable[..., Any], **candidates: Unmet | None) -> None:
    """Announce an op by its public function, and its implementations, the preferred one first.

    Each comes with a function of the operands and options that the op hands to `resolve`. It says
    which condition the call does not meet, or that it is `Slower`; None stands for one that nothing
    can go wrong with.
    """
    _OPS[call.__name__] = _Op(call, candidates)


def implementations(op: str) -> tuple[str, ...]:
    """Return the implementations of an op, the preferred one first."""
    return tuple(_op(op).candidates)


@contextlib.contextmanager
def use_implementation(name: Shared) -> Iterator[None]:
    """Let `auto` mean the named implementation in all ops that are traced inside.

    Raises:
      UnknownName: there is no implementation of this name that every op has.
    """
    with _override(_shared(name, "use_implementation")):
        yield


@contextlib.contextmanager
def recording_choices() -> Iterator[list[Choice]]:
    """Collect what ops choose while they are traced inside, each distinct choice once.

    What jit has traced before is not traced again, and leaves nothing here.
    """
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


def explain(
    op: str, /, *operands: Any, implementation: Implementation = "auto", **options: Any
) -> Choice:
    """Say which implementation of `op` a call runs, and why not the ones before it.

    The op is traced with these arguments and nothing is computed, so the answer, like an error, is
    that of the call itself.

    Args:
      op: name of the op.
      operands: what the call takes by position, arrays or `jax.ShapeDtypeStruct`s; without them and
        options: what is taken first here, although a call may differ.
      implementation: what the call asks for.
      options: what the call takes by name.

    Raises:
      UnknownName: no such op or implementation name.
      KernelUnsupported: the named implementation cannot run this call.
      TypeError: the op takes no such arguments, or not all it needs are there.
    """
    call = _op(op).call
    if not operands and not options:
        return _choose(op, implementation, (), {})
    with recording_choices() as choices:
        _trace(call, operands, {"implementation": implementation, **options})
    return choices[0]


def _trace(call: Callable[..., Any], operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Trace a call whose arrays, and only these, are abstract: ops read Python numbers."""
    leaves, tree = jax.tree.flatten((operands, options))
    arrays = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)}

    def run(arrays: dict[int, Any]) -> Any:
        whole = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        operands, options = jax.tree.unflatten(tree, whole)
        return call(*operands, **options)

    jax.eval_shape(run, arrays)


def resolve(op: str, implementation: Implementation, *operands: Any, **options: Any) -> str:
    """Return the name of the implementation that runs; see `explain` for the errors.

    Args:
      op: name of the op, which calls this once its arguments are checked.
      implementation: what the call asks for.
      operands: arrays that the op's declared conditions look at.
      options: the other arguments that they look at.
    """
    choice = _choose(op, implementation, operands, options)
    seen = _record.get()
    if seen is not None and choice not in seen:
        seen.append(choice)
    return choice.implementation


def _choose(
    op: str, implementation: Implementation, operands: tuple[Any, ...], options: dict[str, Any]
) -> Choice:
    if _known(implementation) != "auto":
        return _named(op, implementation, "asked for by name", operands, options)
    source = "use_implementation" if _override.value else VARIABLE
    override = _shared(_override.value or os.environ.get(VARIABLE) or "auto", source)
    if override != "auto":
        return _named(op, override, f"set by {source}", operands, options)
    rejected = []
    for name, unmet in _op(op).candidates.items():
        why = _unmet(unmet, operands, options)
        if why is None and name in KERNELS and on_cpu():
            why = "no GPU here, where a kernel would only be interpreted"
        if why is None:
            return Choice(op, name, _reason(rejected), tuple(rejected))
        rejected.append(Rejected(name, why))
    raise KernelUnsupported(f"{op}: {_reason(rejected)}. Nothing is left that could run.")


def explain_all() -> list[str]:
    """Describe, a line per op, what `auto` takes first here and why; a call may differ."""
    _load_ops()
    choices = (explain(op) for op in sorted(_OPS))
    return [f"{c.op}: {c.implementation} first, a call may differ ({c.reason})" for c in choices]


def _op(name: str) -> _Op:
    if name not in _OPS:
        _load_ops()
    if name not in _OPS:
        raise unknown_name("op", name, _OPS)
    return _OPS[name]


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


def _shared(name: str, source: str) -> str:
    if name in get_args(Shared):
        return name
    if name in get_args(Implementation):
        raise UnknownName(
            f"{source}: {name} is not an implementation of every op. Ask for it where it exists, "
            f"attention(..., implementation={name!r}), or use {', '.join(get_args(Shared))} here."
        )
    raise unknown_name(f"implementation in {source}", name, get_args(Shared))


def _named(
    op: str, name: str, reason: str, operands: tuple[Any, ...], options: dict[str, Any]
) -> Choice:
    candidates = _op(op).candidates
    if name not in candidates:
        raise KernelUnsupported(
            f"{op} has no implementation {name!r}. It has {', '.join(candidates)}. "
            f"Use one of these, or 'auto'."
        )
    why = _unmet(candidates[name], operands, options)
    if why is not None and not isinstance(why, Slower):
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
