"""Ops over several devices: each one computes its own rows and heads, kernels included.

A partitioner cannot look into a kernel, and would gather all rows on every device. What is a row
and what a head is read from the annotations of the op, such as `Float[Array, "B T H K"]`, which the
tests check at run time: B are rows, H and G (groups of heads) are heads, all else is whole.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.attention_terms import Dropout, Places
from jaxmem.ops.checks import as_arrays

Op = TypeVar("Op", bound=Callable[..., Any])
_WORDS = {"B": "rows", "H": "heads", "G": "groups of heads"}
# The kernels' package knows only JAX, so that its tuples may state no axes.
_STATED: dict[Any, dict[str, str]] = {
    Places: {"query": "B T", "key": "B S", "query_segment": "B T", "key_segment": "B S"}
}


class _Plan(NamedTuple):
    """Which mesh axes split what."""

    op: str
    mesh: Mesh
    rows: tuple[str, ...]
    heads: tuple[str, ...]

    def over(self, axis: str) -> tuple[str, ...]:
        """Return the mesh axes that split an axis of an array."""
        return {"B": self.rows, "H": self.heads, "G": self.heads}.get(axis, ())


def sharded(
    op: Op,
    mesh: Mesh,
    *,
    rows: str | tuple[str, ...] = (),
    heads: str | tuple[str, ...] = (),
) -> Op:
    """Return an op that computes rows and heads on the devices that hold them.

    It takes and returns what the op does. No device needs anything of another one, but for the
    gradients of arrays that all of them read, such as scales, which are summed.

    Args:
      op: a function of this library on arrays, such as `jaxmem.attention`.
      mesh: devices.
      rows: mesh axis, or axes, that the batch is split over; none: it is not.
      heads: mesh axis, or axes, that heads and groups of heads are split over; none: they are not.

    Dropout masks are others than on one device: every device draws with a key of its own.

    Raises:
      ConfigError: there are no such axes in the mesh, or no heads in the op. When it is called: the
        op's annotations do not say what the axes of an array are.
      ShapeError: when it is called: rows, heads or groups do not divide over their devices.
    """
    plan = _Plan(op.__name__, mesh, *((a,) if isinstance(a, str) else a for a in (rows, heads)))
    signature = inspect.signature(op)
    hints = {name: each.annotation for name, each in signature.parameters.items()}
    hints["return"] = signature.return_annotation
    _check_axes(plan, hints)

    @functools.wraps(op)
    def call(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        names, values = tuple(given), as_arrays(*given.values())
        leaves, tree = jax.tree.flatten(values)
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Array)]
        arrays = [leaves[n] for n in places]

        def arguments(arrays: tuple[Array, ...]) -> dict[str, Any]:
            known = dict(zip(places, arrays, strict=True))
            whole = [known.get(n, leaf) for n, leaf in enumerate(leaves)]
            return dict(zip(names, jax.tree.unflatten(tree, whole), strict=True))

        def on_a_device(*arrays: Array) -> list[Array]:
            return jax.tree.leaves(op(**_with_own_keys(plan, arguments(arrays))))

        outputs = jax.eval_shape(lambda *arrays: op(**arguments(arrays)), *arrays)
        of_each = (_specs(plan, n, hints.get(n), a) for n, a in zip(names, values, strict=True))
        in_specs = tuple(spec for specs in of_each for spec in specs)
        out_specs = _specs(plan, "its output", hints.get("return"), outputs)
        # A kernel does not state the mesh axes that its outputs vary over, so none are checked.
        run = jax.shard_map(
            on_a_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.tree.unflatten(
            jax.tree.structure(outputs), run(*_placed(mesh, arrays, in_specs))
        )

    return typing.cast(Op, call)


def _check_axes(plan: _Plan, hints: dict[str, Any]) -> None:
    names = plan.rows + plan.heads
    if not names:
        raise ConfigError(f"sharded {plan.op}: nothing to split. Pass rows='data', say.")
    unknown = [name for name in names if name not in plan.mesh.axis_names]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"sharded {plan.op}: rows={plan.rows}, heads={plan.heads} do not name different axes "
            f"of the mesh. It has {', '.join(map(str, plan.mesh.axis_names))}."
        )
    if plan.heads and not any({"H", "G"} & set(axes) for a in hints.values() for axes in _axes(a)):
        raise ConfigError(f"sharded {plan.op}: it has no heads to split. Leave `heads` out.")


def _axes(annotation: Any) -> list[list[str]]:
    """Return the axes of the arrays that an annotation allows, by name."""
    if isinstance(getattr(annotation, "dim_str", None), str):
        return [annotation.dim_str.split()]
    return [axes for part in typing.get_args(annotation) for axes in _axes(part)]


def _specs(plan: _Plan, name: str, annotation: Any, value: Any) -> list[PartitionSpec]:
    """Return how each array of an argument is split, in the order of its leaves."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return [_spec(plan, name, annotation, value)]
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is None:
            parts = [(name, a, v) for a, v in zip(typing.get_args(annotation), value, strict=True)]
        else:
            hints = _STATED.get(type(value)) or typing.get_type_hints(type(value))
            parts = [(f"{name}.{f}", hints[f], getattr(value, f)) for f in fields]
        return [spec for part in parts for spec in _specs(plan, *part)]
    if any(isinstance(leaf, Array) for leaf in jax.tree.leaves(value)):
        raise _unstated(plan, name)
    return []


def _spec(plan: _Plan, name: str, annotation: Any, array: Any) -> PartitionSpec:
    if array.ndim == 0:
        return PartitionSpec()
    stated = [annotation.split()] if isinstance(annotation, str) else _axes(annotation)
    fitting = [axes for axes in stated if len(axes) == array.ndim and "..." not in axes]
    if len(fitting) != 1:
        raise _unstated(plan, name)
    return PartitionSpec(
        *(
            _split(plan, name, axis, size)
            for axis, size in zip(fitting[0], array.shape, strict=True)
        )
    )


def _split(plan: _Plan, name: str, axis: str, size: int) -> tuple[str, ...] | None:
    """Return the mesh axes that split one axis of an array; `#` marks one that may be 1."""
    over = plan.over(axis.removeprefix("#"))
    if not over or (axis.startswith("#") and size == 1):
        return None
    devices = math.prod(plan.mesh.shape[each] for each in over)
    if size % devices:
        raise ShapeError(
            f"sharded {plan.op}: {name} has {size} {_WORDS[axis.removeprefix('#')]}, which do not "
            f"divide over the {devices} devices of mesh axis {', '.join(over)}. "
            f"Pass a multiple of {devices}, or do not split them."
        )
    return over


def _placed(mesh: Mesh, arrays: list[Array], specs: tuple[PartitionSpec, ...]) -> list[Array]:
    """Move arrays to their devices where the types of arrays say where they are."""
    if AxisType.Explicit not in mesh.axis_types:
        return arrays
    each = zip(arrays, specs, strict=True)
    return [reshard(array, NamedSharding(mesh, spec)) for array, spec in each]


def _unstated(plan: _Plan, name: str) -> ConfigError:
    return ConfigError(
        f"sharded {plan.op}: the annotations do not say what the axes of {name} are. "
        "Write jax.shard_map around this call yourself."
    )


def _with_own_keys(plan: _Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a key for dropout that no other device has."""

    def own(value: Any) -> Any:
        if not isinstance(value, Dropout):
            return value
        device = lax.axis_index(plan.rows + plan.heads)
        return value._replace(key=jax.random.fold_in(value.key, device))

    return {name: own(value) for name, value in given.items()}
