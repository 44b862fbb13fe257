"""Choice between the implementations of an op: `auto` says why, a named one runs or raises.

`auto` takes the first implementation that can run, in the order in which the op declares them; a
kernel that would only be interpreted is never taken. In a process with a GPU a trace does not know
where its code will run, so `auto` takes a kernel for the GPU and plain JAX for anywhere else.
`use_implementation` or the environment variable JAXMEM_IMPLEMENTATION replace `auto` everywhere;
what a call names itself stays.
"""

import contextlib
import contextvars
import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmem.errors import KernelUnsupported, UnknownName, unknown_name
from pallas_kernels._compat import default_platform, target
from pallas_kernels._interpret import on_cpu
from pallas_kernels._launch import device_unmet

Shared = Literal["auto", "reference", "xla", "pallas"]
"""Names that every op knows."""
Implementation = Literal[Shared, "cudnn"]
Unmet = Callable[..., str | None]
"""From the operands and options of a call to the condition it does not meet, or None."""

VARIABLE = "JAXMEM_IMPLEMENTATION"
KERNELS = ("pallas", "cudnn")
INTERPRETED = (
    "A kernel was asked for by name where there is no GPU: it is interpreted, which shows that its "
    "mathematics is right and is up to a thousand times slower. Use implementation='xla' on a CPU."
)
"""What is said once where a kernel is interpreted; `interpret=True` asks for that in silence."""
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


class Slower(str):
    """A condition that only `auto` minds: the implementation runs, but another one is faster."""

    __slots__ = ()


_FEW = 16


def few_tokens(length: int) -> Slower | None:
    """Say that a call has too few tokens (or queries) for kernels that are built for long rows."""
    if length > _FEW:
        return None
    return Slower(f"kernels are built for long rows, and this call has {length} tokens")


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
    elsewhere: str | None = None
    """What runs instead where the arrays make the code run on another platform than the default
    one: plain JAX off the GPU, or a kernel on it; None: the same."""

    @property
    def kernel(self) -> str | None:
        """The kernel that runs on a GPU; None: none."""
        return next((n for n in (self.implementation, self.elsewhere) if n in KERNELS), None)

    @property
    def plain(self) -> str | None:
        """The form in plain JAX that runs off the GPU, or everywhere; None: a kernel was named."""
        names = (self.implementation, self.elsewhere)
        return next((n for n in names if n is not None and n not in KERNELS), None)


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
    that of the call itself. Arrays that were put on one device count as being there; otherwise it
    is for `jax.default_device`.

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
    with recording_choices() as choices, jax.default_device(_device_of(operands, options)):
        _trace(call, operands, {"implementation": implementation, **options})
    return choices[0]


def _device_of(*trees: Any) -> Any:
    """Return the device that committed arrays stand on, or the one of `jax.default_device`."""
    leaves = [a for a in jax.tree.leaves(trees) if isinstance(a, jax.Array)]
    concrete = [a for a in leaves if not isinstance(a, Tracer)]
    devices = [device for a in concrete if a.committed for device in a.devices()]
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return devices[0] if devices else default


def _trace(call: Callable[..., Any], operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Trace a call whose arrays, and only these, are abstract: ops read Python numbers."""
    leaves, tree = jax.tree.flatten((operands, options))
    arrays = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)}

    def run(arrays: dict[int, Any]) -> Any:
        whole = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        operands, options = jax.tree.unflatten(tree, whole)
        return call(*operands, **options)

    jax.eval_shape(run, arrays)


def resolve(
    op: str,
    implementation: Implementation,
    *operands: Any,
    interpret: bool | None = None,
    **options: Any,
) -> Choice:
    """Return which implementation runs where; see `explain` for the errors.

    Args:
      op: name of the op, which calls this once its arguments are checked.
      implementation: what the call asks for.
      operands: arrays that the op's declared conditions look at.
      interpret: whether the call asks for an interpreted kernel; None: it does not say.
      options: the other arguments that the conditions look at.
    """
    choice = _choose(op, implementation, operands, options)
    if choice.implementation in KERNELS and on_cpu() and interpret is None:
        _warn_interpreted()
    seen = _record.get()
    if seen is not None and choice not in seen:
        seen.append(choice)
    return choice


def _choose(
    op: str, implementation: Implementation, operands: tuple[Any, ...], options: dict[str, Any]
) -> Choice:
    if _known(implementation) != "auto":
        return _named(op, implementation, "asked for by name", operands, options)
    source = "use_implementation" if _override.value else VARIABLE
    override = _shared(_override.value or os.environ.get(VARIABLE) or "auto", source)
    if override != "auto":
        return _named(op, override, f"set by {source}", operands, options)
    rejected: list[Rejected] = []
    kernel = None
    for name, unmet in _op(op).candidates.items():
        if kernel is not None and name in KERNELS:
            continue
        why = _no_gpu() if name in KERNELS else None
        why = why or _unmet(name, unmet, operands, options)
        if why is not None:
            if kernel is None:
                rejected.append(Rejected(name, why))
        elif name in KERNELS:
            kernel = name
        else:
            return _placed(op, kernel, name, rejected)
    raise KernelUnsupported(f"{op}: {_reason(rejected)}. Nothing is left that could run.")


def _placed(op: str, kernel: str | None, plain: str, rejected: list[Rejected]) -> Choice:
    """Return the choice between a kernel for the GPU, if there is one, and plain JAX."""
    if kernel is None:
        return Choice(op, plain, _reason(rejected), tuple(rejected))
    if default_platform() == "gpu":
        return Choice(op, kernel, _reason(rejected), tuple(rejected), elsewhere=plain)
    rejected.append(Rejected(kernel, f"code runs on the {default_platform()} here"))
    return Choice(op, plain, _reason(rejected), tuple(rejected), elsewhere=kernel)


def _no_gpu() -> str | None:
    """Say why `auto` takes no kernel here, whatever the call is, or None."""
    if target() is None and on_cpu():
        return "no GPU here, where a kernel would only be interpreted"
    return device_unmet()


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
    why = _unmet(name, candidates[name], operands, options)
    if why is not None and not isinstance(why, Slower):
        others = [n for n in candidates if n != name and _runs(op, n, operands, options)]
        raise KernelUnsupported(
            f"{op} cannot run implementation {name!r}: {why}. "
            f"Use 'auto', or one of {', '.join(others)}."
        )
    if name in KERNELS and on_cpu():
        reason += "; interpreted, as there is no GPU here"
    return Choice(op, name, reason)


def _runs(op: str, name: str, operands: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Return whether an implementation can run a call, and not only interpreted."""
    if name in KERNELS and _no_gpu() is not None:
        return False
    why = _unmet(name, _op(op).candidates[name], operands, options)
    return why is None or isinstance(why, Slower)


@cache
def _warn_interpreted() -> None:
    """Warn, once per process, that a kernel is about to be interpreted."""
    warnings.warn(INTERPRETED, UserWarning, stacklevel=2)


def _unmet(
    name: str, unmet: Unmet | None, operands: tuple[Any, ...], options: dict[str, Any]
) -> str | None:
    if unmet is None or not operands:
        return None
    if name in KERNELS and not all(_known_sizes(a) for a in jax.tree.leaves(operands)):
        return "a kernel needs known sizes, and this call has symbolic ones"
    return unmet(*operands, **options)


def _known_sizes(array: Any) -> bool:
    return all(isinstance(size, int) for size in jnp.shape(array))


def _reason(rejected: list[Rejected]) -> str:
    if not rejected:
        return "the preferred implementation"
    return "; ".join(f"not {name}: {why}" for name, why in rejected)
