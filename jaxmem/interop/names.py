"""Parameters by the names and layouts of original checkpoints, both ways.

A family file states a `Names` table: for each parameter of ours, the original's name and layout.
Layouts only move entries, so the same table turns our gradients into the original's gradients.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.errors import CheckpointMismatch

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_LISTED_NAMES = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_LISTED = 8
"""Names of each kind that a message lists."""


class Layout(NamedTuple):
    """How an original array relates to ours; the two functions are inverse to each other."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_original: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
TRANSPOSED = Layout(np.transpose, np.transpose)
"""(out, in) weights of the original, (in, out) here."""
PER_HEAD = Layout(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
"""(1, H, 1, 1) of the original, (H,) here."""
BANKS = Layout(lambda a: a[:, 0], lambda a: a[:, None])
"""(R, 1, H, P, K) of the original, (R, H, P, K) here."""
LEADING = Layout(lambda a: a[0], lambda a: a[None])
"""(1, ...) of the original, (...) here."""


def _conv_to_ours(a: np.ndarray) -> np.ndarray:
    return a.transpose(2, 1, 0).reshape(-1, a.shape[0])


def _conv_to_original(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[1], a.shape[1]).transpose(2, 1, 0)


CONV = Layout(_conv_to_ours, _conv_to_original)
"""(out, in, J) of a convolution with as many inputs as outputs, (J·in, out) here."""


class Origin(NamedTuple):
    """Where a parameter comes from."""

    name: str
    """Dotted name in the original; `{n}` stands for a layer number, `{i}` for an index of our first
    axis, where the original has a tensor for each, and `{q|k|v}` for names of tensors that stand
    side by side along our last axis."""
    layout: Layout = SAME
    """Of a tensor of the original; where it has several, against its part of ours."""

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Return the names of the tensors that make up a parameter of this shape."""
        if "{i}" in self.name:
            return [self.name.replace("{i}", str(i)) for i in range(shape[0])]
        listed = _LISTED_NAMES.search(self.name)
        if listed is None:
            return [self.name]
        return [self.name.replace(listed[0], each) for each in listed[1].split("|")]

    def to_ours(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Take the parameter out of arrays by original name."""
        parts = [self.layout.to_ours(arrays[name]) for name in self.names(shape)]
        if "{i}" in self.name:
            return np.stack(parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def to_original(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors of the original by name."""
        names = self.names(array.shape)
        if "{i}" in self.name:
            parts = array
        else:
            parts = [array] if len(names) == 1 else np.split(array, len(names), axis=-1)
        layout = self.layout.to_original
        return {n: np.asarray(layout(a), order="C") for n, a in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class Names:
    """The original names of a module's parameters, or of a part of it.

    A table may list parameters that a configuration lacks, such as biases: what counts is what the
    module has.
    """

    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Dotted path of our parameter, `{n}` for a layer number -> origin."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second name of a tied tensor -> first name, both with `{n}` for a layer number."""
    constants: tuple[str, ...] = ()
    """Regular expressions of buffers that the original saves but never trains."""

    def under(self, original: str, path: str | None = None) -> "Names":
        """Return the same table for a part that stands at `path` here and `original` there.

        Without `path` it is no part of its own here.
        """
        prefix = "" if path is None else f"{path}."
        return Names(
            {
                f"{prefix}{ours}": Origin(f"{original}.{origin.name}", origin.layout)
                for ours, origin in self.origins.items()
            },
            {f"{original}.{a}": f"{original}.{b}" for a, b in self.aliases.items()},
            tuple(
                rf"{re.escape(original).replace(re.escape('{n}'), '[0-9]+')}\.{constant}"
                for constant in self.constants
            ),
        )

    def __or__(self, other: "Names") -> "Names":
        return Names(
            {**self.origins, **other.origins},
            {**self.aliases, **other.aliases},
            self.constants + other.constants,
        )

    def origin(self, path: str) -> Origin:
        """Return the origin of one parameter, with its layer number filled in.

        Raises:
          CheckpointMismatch: the table does not list the parameter.
        """
        layer = _LAYER.search(path)
        pattern = path if layer is None else _LAYER.sub("{n}", path, count=1)
        if pattern not in self.origins:
            raise CheckpointMismatch(
                f"Parameter {path} has no original name in this mapping. "
                "Use the mapping of the family that the module belongs to."
            )
        name, layout = self.origins[pattern]
        return Origin(name if layer is None else name.replace("{n}", layer[0]), layout)

    def second_names(self, originals: Collection[str]) -> dict[str, str]:
        """Return second name -> first name for those first names that occur in `originals`.

        A second name that occurs itself belongs to a tensor of its own: nothing is tied then.
        """
        found = {}
        for alias, first in self.aliases.items():
            pattern = re.escape(first).replace(re.escape("{n}"), "([0-9]+)")
            matches = (re.fullmatch(pattern, name) for name in originals)
            found |= {alias.replace("{n}", "".join(m.groups())): m[0] for m in matches if m}
        return {alias: first for alias, first in found.items() if alias not in originals}

    def is_constant(self, name: str) -> bool:
        """Say whether an original name is a constant buffer."""
        return any(re.fullmatch(pattern, name) for pattern in self.constants)


def linear(original: str, path: str, *, layout: Layout = TRANSPOSED) -> Names:
    """Return the names of a projection; originals store the weight as (out, in)."""
    return Names(
        {
            f"{path}.kernel": Origin(f"{original}.weight", layout),
            f"{path}.bias": Origin(f"{original}.bias"),
        }
    )


def layer_norm(original: str, path: str) -> Names:
    """Return the names of a layer norm."""
    return Names(
        {
            f"{path}.weight": Origin(f"{original}.weight"),
            f"{path}.bias": Origin(f"{original}.bias"),
        }
    )


def identity(module: nnx.Module) -> Names:
    """Return the table of our own names: every parameter by its dotted path, as it is."""
    patterns = (_LAYER.sub("{n}", path, count=1) for path in params_of(module))
    return Names({pattern: Origin(pattern) for pattern in patterns})


def to_ours(
    names: Names, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Turn arrays by original name into arrays by our path, in the order and shapes of `shapes`.

    Raises:
      CheckpointMismatch: tensors are missing, unknown, misshapen, not floating point or not
        finite, or tied ones differ; the message lists the first of each.
    """
    wanted = {path: names.origin(path) for path in shapes}
    expected = {
        name: a.shape
        for path, origin in wanted.items()
        for name, a in origin.to_original(np.empty(shapes[path], np.bool_)).items()
    }
    second = names.second_names(expected)
    missing = [name for name in expected if name not in arrays]
    known = {*expected, *second}
    unknown = [name for name in arrays if name not in known and not names.is_constant(name)]
    misshapen = [
        f"{name} {arrays[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    untied = [
        f"{alias} and {name}"
        for alias, name in second.items()
        if alias in arrays
        and name in arrays
        and not np.array_equal(arrays[alias], arrays[name], equal_nan=True)
    ]
    used = {name: arrays[name] for name in expected if name in arrays}
    numbers = {n: a for n, a in used.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    found = {
        "missing": missing,
        "unknown": unknown,
        "misshapen": misshapen,
        "tied but unequal": untied,
        "not floating point": [f"{n} ({a.dtype})" for n, a in used.items() if n not in numbers],
        "not finite": [n for n, a in numbers.items() if not np.all(np.isfinite(a))],
    }
    if any(found.values()):
        listed = "; ".join(f"{kind}: {_some(items)}" for kind, items in found.items() if items)
        raise CheckpointMismatch(
            f"The weights do not fit the model. {listed}. "
            "Give the model the sizes, depth and biases of the weights, or weights of this model."
        )
    return {path: origin.to_ours(arrays, shapes[path]) for path, origin in wanted.items()}


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def to_original(names: Names, values: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Turn arrays by our path (parameters or gradients) into arrays by first original name."""
    found: dict[str, np.ndarray] = {}
    for path, value in values.items():
        found |= names.origin(path).to_original(np.asarray(value))
    return found


def import_params(module: nnx.Module, arrays: Mapping[str, np.ndarray], names: Names) -> None:
    """Set every parameter of `module` from arrays by original name, cast to its dtype.

    Constant buffers are ignored; a tied tensor under its second name is checked and dropped.

    Raises:
      CheckpointMismatch: see `to_ours`; the module is then unchanged.
    """
    params = params_of(module)
    values = to_ours(names, arrays, {path: param.shape for path, param in params.items()})
    for path, param in params.items():
        param[...] = jnp.asarray(values[path], param.dtype)


def export_params(module: nnx.Module, names: Names) -> dict[str, np.ndarray]:
    """Return the parameters of `module` by original name, tied tensors under each of their names.

    Raises:
      CheckpointMismatch: the module has a parameter that the mapping does not list.
    """
    arrays = to_original(names, {path: param[...] for path, param in params_of(module).items()})
    return arrays | {alias: arrays[name] for alias, name in names.second_names(arrays).items()}


def params_of(module: nnx.Module) -> dict[str, nnx.Param]:
    """Return all parameters by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param for path, param in flat}
