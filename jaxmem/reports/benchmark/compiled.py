"""What the compiler makes of every kernel and of whole training steps, without a GPU."""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from typing import Any, Literal

import jax

import pallas_kernels
from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.errors import ConfigError, MissingExtra, unknown_name
from jaxmem.reports.benchmark import result
from jaxmem.reports.benchmark.mosaics import STEP_DEVICE, predict
from pallas_kernels import _deviceless, _lock

Submit = Callable[[_lock.Call, str], Future[list[_deviceless.KernelUse]]]
"""Begins to compile a call for a device."""


def compile_report(models: Mapping[str, DecoderConfig]) -> result.Result:
    """Tell what the lock files say of the kernels, and compile training steps for one device.

    Args:
      models: configs of `mosaics.PRESETS` by name.

    Raises:
      MissingExtra: the compiler is not installed.
    """
    _demand_compiler()
    rows = [
        _cell(kernel, row)
        for kernel, folder in _lock.tables()
        for row in _lock.read(kernel, folder).rows.values()
    ]
    print("training steps", file=sys.stderr)
    steps, _ = predict(models)
    for step in steps:
        step["device"] = STEP_DEVICE
    return result.environment() | {"kind": "compile_report", "cells": rows, "steps": steps}


def renew_locks(which: Literal["changed", "all"], kernel: str | None) -> result.Result:
    """Compile calls of kernels for the devices of the lock files, and write what is said of them.

    Each row is written when it is known, so an interrupted run goes on with `which="changed"`.

    Args:
      which: calls without a current row, or all.
      kernel: name of a kernel folder; None: all.

    Raises:
      MissingExtra: the compiler is not installed.
      UnknownName: there is no such kernel.
      ConfigError: JAX is older than the one of the files, or calls do not compile.
    """
    _demand_compiler()
    known = pallas_kernels.names()
    if kernel is not None and kernel not in known:
        raise unknown_name("kernel", kernel, known)
    pool = _deviceless.workers()

    def submit(call: _lock.Call, device: str) -> Future[list[_deviceless.KernelUse]]:
        return pool.submit(_deviceless.kernel_uses, device, call.case.function, *call.case.operands)

    cells, refused = [], []
    try:
        for name, folder in _lock.tables():
            for row in renew(name, folder, submit, which) if kernel in (None, name) else ():
                if isinstance(row, str):
                    refused.append(row)
                else:
                    cells.append(_cell(name, row))
    finally:
        pool.shutdown(cancel_futures=True)
    if refused:
        raise ConfigError("\n".join(refused))
    return result.environment() | {"kind": "compile_report", "cells": cells, "steps": []}


def renew(
    kernel: str, folder: str, submit: Submit, which: Literal["changed", "all"]
) -> Iterator[_lock.Row | str]:
    """Renew the lock file of a table; yield each new row, or why there is none.

    Raises:
      ConfigError: JAX is older than the one of the file.
    """
    lock = _lock.read(kernel, folder)
    if _lock.older(lock):
        raise ConfigError(_lock.unknown_compiler(lock))
    old = lock.rows if which == "changed" and _lock.compared(lock) else {}
    lock, jobs, calls = _lock.Lock(_lock.versions(), {}), {}, _lock.calls(kernel, folder)
    for call in calls:
        texts = _lock.lower(call)
        for device in _lock.DEVICES:
            key, digest = _lock.key(call, device), _lock.digest(texts, device)
            if key in old and old[key].text == digest:
                lock.rows[key] = old[key]
            else:
                jobs[submit(call, device)] = (key, digest, [name for name, _ in texts])
    _lock.write(kernel, folder, lock)
    wanted = len(calls) * len(_lock.DEVICES)
    print(f"{folder}/{kernel}: {len(jobs)} of {wanted} rows to compile", file=sys.stderr)
    for job in as_completed(jobs):
        key, digest, names = jobs[job]
        try:
            uses = {use.name: use for use in job.result()}
        except jax.errors.JaxRuntimeError as error:
            yield f"{kernel}, {' '.join(map(str, key))}: {str(error).splitlines()[0]}"
            continue
        kernels = {name: uses[name].numbers() for name in names}
        said = {"text": digest, "ptxas": uses[names[0]].ptxas, "kernels": kernels}
        lock.rows[key] = _lock.Row(*key, **said)
        _lock.write(kernel, folder, lock)
        yield lock.rows[key]


def _demand_compiler() -> None:
    if absent := _deviceless.missing():
        raise MissingExtra(
            f"Kernels are compiled for GPUs that are not here by a plugin. {absent}."
        )


def _cell(kernel: str, row: _lock.Row) -> dict[str, Any]:
    return {"kernel": kernel, **row._asdict()}
