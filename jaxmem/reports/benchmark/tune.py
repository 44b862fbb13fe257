"""Search for launch configurations on the GPU at hand, and the tables that are written from it."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from jaxmem.errors import ConfigError, unknown_name
from jaxmem.reports.benchmark import result, timing
from pallas_kernels import _launch
from pallas_kernels._launch import Case, Entry

GAIN = 0.97
"""A configuration must take at most this part of the time to be preferred."""
_AGREEMENT = 2e-2
"""Largest relative RMS difference between results of two configurations; wrong ones are far off."""


def tune(kernel: str | None) -> result.Result:
    """Improve the entries of the default tables for this GPU and write them to its own tables.

    Args:
      kernel: name of a kernel folder; None: all.

    Raises:
      ConfigError: there is no GPU here.
      UnknownName: there is no such kernel.
    """
    known = pallas_kernels.names()
    if kernel is not None and kernel not in known:
        raise unknown_name("kernel", kernel, known)
    if jax.default_backend() != "gpu":
        raise ConfigError(
            f"--tune measures kernels on a GPU; this is {jax.default_backend()}. "
            "Start it on the GPU whose tables are to be written."
        )
    device, cells = jax.devices()[0].device_kind, []
    for name in known if kernel is None else [kernel]:
        tuned = []
        for entry in _launch.entries(name):
            cell = tune_entry(name, entry, functools.partial(_seconds, name))
            print(f"{name} {entry.dtype} {entry.width}: {cell['config']}", file=sys.stderr)
            cells.append(cell)
            tuned.append(entry._replace(config=cell["config"]))
        print(f"written: {write_table(device, name, tuned)}", file=sys.stderr)
    return result.environment() | {"kind": "tune", "cells": cells}


def tune_entry(
    kernel: str, entry: Entry, seconds: Callable[[Entry, Entry], float | None]
) -> dict[str, Any]:
    """Walk from the entry's configuration to faster neighbours until there are none.

    Args:
      kernel: name of the kernel.
      entry: where to start.
      seconds: (entry, start) -> time of the entry's kernels, None if they do not compile or their
        results differ from those of `start`.

    Raises:
      ConfigError: the start itself cannot be measured.
    """
    first = seconds(entry, entry)
    if first is None:
        raise ConfigError(f"{kernel} does not run with its default entry {entry}.")
    best, fastest, seen = entry, first, {_key(entry.config)}
    improved = True
    while improved:
        improved = False
        for config in neighbours(best.config):
            if _key(config) in seen:
                continue
            seen.add(_key(config))
            candidate = best._replace(config=config)
            found = seconds(candidate, entry)
            if found is not None and found < GAIN * fastest:
                best, fastest, improved = candidate, found, True
    return {
        "kernel": kernel,
        "dtype": entry.dtype,
        "width": entry.width,
        "length": entry.length,
        "rows": entry.rows,
        "before_ms": 1e3 * first,
        "after_ms": 1e3 * fastest,
        "tried": len(seen),
        "config": best.config,
    }


def neighbours(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Vary a field at a time: stages by one, other numbers by a factor of two."""
    for field, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        around = (value - 1, value + 1) if "stages" in field else (value // 2, 2 * value)
        for other in around:
            if other >= 1:
                yield config | {field: other}


def write_table(device: str, kernel: str, table: list[Entry], root: Path = _launch.TABLES) -> Path:
    """Write a table of a device and return its path."""
    path = root / _launch.device_folder(device) / f"{kernel}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_launch.as_json(entry)) for entry in table]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")
    return path


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _cases(kernel: str, entry: Entry) -> list[Case]:
    return pallas_kernels.cases_of(kernel).cases(entry)


def _seconds(kernel: str, entry: Entry, start: Entry) -> float | None:
    """Time all kernels of an entry, unless they fail or disagree with those of the start."""
    total = 0.0
    for case, known in zip(_cases(kernel, entry), _cases(kernel, start), strict=True):
        operands = draw(case.operands)
        try:
            call = functools.partial(jax.jit(case.function), *operands)
            found = call()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError):
            return None
        if not agree(found, jax.jit(known.function)(*operands)):
            return None
        total += timing.time_calls({"case": call}, rounds=1)["case"].median_ms / 1e3
    return total


def draw(operands: Any) -> Any:
    """Return arrays of the operands' shapes: normal ones, positive per-head scalars, integer 0.

    Numbers per token and head are small and negative: as logarithms of gates they sum to decays
    that neither overflow nor forget everything.
    """
    draw = np.random.default_rng(0)

    def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        drawn = draw.normal(size=shape.shape)
        signs = {1: np.abs(drawn), 3: -np.abs(drawn) / 16}
        return jnp.asarray(signs.get(len(shape.shape), drawn), shape.dtype)

    return jax.tree.map(array, operands)


def agree(found: Any, expected: Any) -> bool:
    """Say whether two results are the same up to rounding."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(_difference(a, b) <= _AGREEMENT for a, b in pairs)


def _difference(found: jax.Array, expected: jax.Array) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
