"""What the compiler makes of every kernel and of whole training steps, without a GPU."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import pallas_kernels
from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.errors import MissingExtra
from jaxmem.reports.benchmark import result
from jaxmem.reports.benchmark.mosaics import STEP_DEVICE, predict
from pallas_kernels import _deviceless
from pallas_kernels._launch import Case, Entry, entries

DEVICES = ("NVIDIA A100", "NVIDIA H100")
"""One device of each generation that kernels are compiled for."""
_SPILLS = "register spilling"


def compile_report(
    models: Mapping[str, DecoderConfig], *, devices: Sequence[str] = DEVICES
) -> result.Result:
    """Compile every entry of the default tables for every device, and training steps for one.

    Args:
      models: configs of `mosaics.PRESETS` by name.
      devices: kinds of devices.

    Raises:
      MissingExtra: the compiler is not installed.
    """
    if absent := _deviceless.missing():
        raise MissingExtra(
            f"Kernels are compiled for GPUs that are not here by a plugin. {absent}."
        )
    cells = []
    for device in devices:
        for name in pallas_kernels.names():
            print(f"{device}: {name}", file=sys.stderr)
            cells += [compile_entry(name, entry, device) for entry in entries(name)]
    print("training steps", file=sys.stderr)
    steps, _ = predict(models)
    for step in steps:
        step["device"] = STEP_DEVICE
    return result.environment() | {"kind": "compile_report", "cells": cells, "steps": steps}


def compile_entry(name: str, entry: Entry, device: str) -> dict[str, Any]:
    """Compile the kernels of a table's entry and report the largest of each number."""
    uses: list[_deviceless.KernelUse] = []
    problems = []
    for case in pallas_kernels.cases_of(name).cases(entry):
        problem = _compile(case, device, uses)
        if problem:
            problems.append(f"{case.name}: {problem}")
    return {
        "device": device,
        "kernel": name,
        "dtype": entry.dtype,
        "width": entry.width,
        "length": entry.length,
        "rows": entry.rows,
        "config": entry.config,
        "shared_bytes": max((use.shared_bytes for use in uses), default=None),
        "threads": max((use.threads for use in uses), default=None),
        "problem": "; ".join(problems),
        "excused": entry.spills,
    }


def _compile(case: Case, device: str, uses: list[_deviceless.KernelUse]) -> str | None:
    """Add what the kernels of a case use, and return what is wrong with them, or None."""
    try:
        uses += _deviceless.kernel_uses(device, case.function, *case.operands)
        _deviceless.compile_for(device, case.function, *case.operands, spills=False)
    except jax.errors.JaxRuntimeError as error:
        return "spills registers" if _SPILLS in str(error) else str(error).splitlines()[0]
    return None
