"""From a golden file's meta to this project's arrays for its keys, one adapter per kind of module.

An adapter is a module of this folder with

    SYSTEM                           name of the set of files that it belongs to, and of its folder
    recognises(meta) -> bool         whether it can rebuild the file
    compute(golden, dtype) -> list   per implementation, arrays for the `output/*` and `grad/*` keys

A system may have several. `compute` raises Unsupported for options that the project does not have.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

Arrays = dict[str, np.ndarray]


class Unsupported(Exception):
    """No module of this project corresponds to the file."""


class Mismatch(Exception):
    """The file and this project disagree about something that is not an array."""


@dataclass(frozen=True)
class Golden:
    """A golden file: what went in, what came out, and how."""

    path: Path
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def group(self, name: str) -> Arrays:
        """Return the arrays of a group (`input`, `param`, ...) by the rest of their names."""
        start = f"{name}/"
        return {k.removeprefix(start): a for k, a in self.arrays.items() if k.startswith(start)}

    def inputs(self, dtype: np.dtype) -> dict[str, jax.Array]:
        """Return the inputs, floating-point ones in `dtype`."""
        return cast(self.group("input"), dtype)


def cast(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, jax.Array]:
    """Move arrays to the device, floating-point ones in `dtype`, indices as they are."""
    return {
        name: jax.numpy.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else None)
        for name, a in arrays.items()
    }


def load(path: Path) -> Golden:
    """Read a golden file."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files if name != "meta"}
        return Golden(path, json.loads(str(data["meta"])), arrays)


def find(golden: Golden) -> tuple[str, ModuleType]:
    """Return the system of a file and its adapter, the first that recognises the file's meta.

    Adapters of another system are not asked where the file's folder names its system.

    Raises:
      Unsupported: no adapter knows the file.
    """
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    adapters = [module for module in modules if hasattr(module, "recognises")]
    folder = golden.path.absolute().parent.name
    own = [adapter for adapter in adapters if folder == adapter.SYSTEM]
    for adapter in own or adapters:
        if adapter.recognises(golden.meta):
            return adapter.SYSTEM, adapter
    raise Unsupported(f"no adapter for {golden.meta.get('module', 'a file without module')!r}")
