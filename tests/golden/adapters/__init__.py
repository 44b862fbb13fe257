"""One adapter per system: from a golden file's meta to this project's arrays for its keys.

An adapter is a module of this folder, named like the folder of its files, with

    recognises(meta) -> bool         whether a file that lies elsewhere belongs to the system
    compute(golden, dtype) -> list   per implementation, arrays for the `output/*` and `grad/*` keys

`compute` raises Unsupported for a kind of file that the project cannot rebuild yet.
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
        name: jax.numpy.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else a.dtype)
        for name, a in arrays.items()
    }


def load(path: Path) -> Golden:
    """Read a golden file."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files if name != "meta"}
        return Golden(path, json.loads(str(data["meta"])), arrays)


def find(golden: Golden) -> tuple[str, ModuleType]:
    """Return the system of a file and its adapter: by folder name, or else by its meta.

    Raises:
      Unsupported: no adapter knows the file.
    """
    adapters = {
        module.name: importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    }
    systems = {name: a for name, a in adapters.items() if hasattr(a, "recognises")}
    folder = golden.path.absolute().parent.name
    if folder in systems:
        return folder, systems[folder]
    for name, adapter in systems.items():
        if adapter.recognises(golden.meta):
            return name, adapter
    raise Unsupported(f"no adapter for {folder}")
