"""Launch configurations: committed tables, the lookup, and what a device must offer.

A table is `tuned/<device kind>/<kernel>.json`, a list of entries `{"dtype", "width", "length",
"rows", "config"}`; `tuned/default` serves devices that were not measured. Tables are data: a lookup
is deterministic, and nothing is tuned while tracing. `python -m experiments.benchmark --tune`
measures and rewrites the table of the device at hand.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from pallas_kernels._compat import Target, backend_missing, default_platform, target

TABLES = Path(__file__).parent / "tuned"
DTYPES = ("bfloat16", "float16", "float32")
MAX_WIDTH = 256
"""Widest head that kernels take."""
MIN_CAPABILITY = (8, 0)
SHARED_BYTES = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 1): 232448,
    (10, 3): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
"""Bytes of shared memory that one program may use, by compute capability."""

Config = TypeVar("Config")


class Entry(NamedTuple):
    """One row of a table: for which calls, and how to launch."""

    dtype: str
    width: int
    """Largest head width it is meant for."""
    length: int
    """Tokens it was measured (or chosen) at."""
    rows: int
    """Programs along batch and heads it was measured (or chosen) at."""
    config: dict[str, Any]
    spills: str = ""
    """Why the kernel may spill registers with this entry; empty if it must not."""


class Case(NamedTuple):
    """A kernel with operands, for tests of lowering and compilation and for reports."""

    name: str
    function: Callable
    operands: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct`."""


def entries(kernel: str, device: str = "default") -> list[Entry]:
    """Return the table of a kernel for a device kind; empty if there is none.

    Raises:
      ValueError: the table is damaged.
    """
    path = TABLES / device_folder(device) / f"{kernel}.json"
    if not path.exists():
        return []
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"The launch table {path.name} of {device} is damaged: {error}."
        ) from error


def lookup(
    kernel: str, config: type[Config], dtype: str, width: int, length: int, rows: int
) -> Config:
    """Return the launch configuration of a call: the nearest entry of the device, else a default.

    Nearest: same dtype, the smallest width that holds the call's, then the smallest distance of
    log2 of length and rows. Coarse on purpose: a table never needs the exact length.

    Raises:
      LookupError: not even the default table has an entry of this dtype and width.
    """
    gpu = target()
    devices = ("default",) if gpu is None else (gpu.kind, "default")
    return _lookup(kernel, config, dtype, width, length, rows, devices)


@cache
def _lookup(
    kernel: str,
    config: type[Config],
    dtype: str,
    width: int,
    length: int,
    rows: int,
    devices: tuple[str, ...],
) -> Config:
    for device in devices:
        fitting = [e for e in entries(kernel, device) if e.dtype == dtype and e.width >= width]
        if fitting:
            narrow = min(e.width for e in fitting)
            best = min(
                (e for e in fitting if e.width == narrow),
                key=lambda e: _apart(e.length, length) + _apart(e.rows, rows),
            )
            return config(**best.config)
    raise LookupError(f"{kernel} has no launch configuration for {dtype} of width {width}.")


def unmet(dtype: Any, *widths: int) -> str | None:
    """Say why kernels cannot take a call with this dtype and these head widths here, or None."""
    why = device_unmet()
    if why:
        return why
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"kernels take {', '.join(DTYPES)}, not {name}"
    if max(widths) > MAX_WIDTH:
        return f"kernels take head widths to {MAX_WIDTH}, not {max(widths)}"
    return None


def device_unmet() -> str | None:
    """Say why no kernel can run here, interpreted or compiled, or None."""
    missing = backend_missing()
    if missing:
        return missing
    gpu = target()
    if gpu is None:
        platform = default_platform()
        known = f"kernels run on CUDA GPUs and, interpreted, on CPU; this is {platform}"
        return None if platform == "cpu" else known
    if gpu.capability is None:
        return f"kernels run on CUDA GPUs; {gpu.kind} reports no CUDA compute capability"
    if gpu.capability < MIN_CAPABILITY:
        found = ".".join(map(str, gpu.capability))
        return f"kernels need compute capability 8.0 or more; {gpu.kind} has {found}"
    return None


def shared_limit(gpu: Target | None) -> int:
    """Return the bytes of shared memory that one program may use on a GPU.

    An unknown GPU gets the smallest; without one nothing is compiled, and the largest is allowed.

    Reference: CUDA C++ Programming Guide, technical specifications per compute capability
      (maximum amount of shared memory per thread block).
    """
    if gpu is None:
        return max(SHARED_BYTES.values())
    return SHARED_BYTES.get(gpu.capability or (0, 0), min(SHARED_BYTES.values()))


def too_much_shared(kernel: str, needed: int) -> str | None:
    """Say that a launch asks for more shared memory than the device has, or None."""
    limit = shared_limit(target())
    if needed <= limit:
        return None
    return f"{kernel} would use {needed} bytes of shared memory of the {limit} there are"


def not_power_of_two(config: Any, *tiles: str) -> str | None:
    """Say which size of a configuration is no power of two, or None.

    A tile of another size fails with an error of Pallas; other numbers of warps abort the process.

    Args:
      config: launch configuration, a dataclass; its fields `...warps` are looked at anyway.
      tiles: fields that are sides of tiles; products of matrices take 16 and more.
    """
    warps = [field.name for field in dataclasses.fields(config) if field.name.endswith("warps")]
    for fields, least in ((tiles, 16), (warps, 1)):
        for field in fields:
            value = getattr(config, field)
            if value != power_of_two(value, least):
                return (
                    f"its configuration has {field}={value}, which is no power of two from {least}"
                )
    return None


def power_of_two(size: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least `size` and `least` (tile sizes are)."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def as_json(entry: Entry) -> dict[str, Any]:
    """Return an entry as it stands in a table."""
    fields = entry._asdict()
    if dataclasses.is_dataclass(entry.config):
        fields["config"] = dataclasses.asdict(entry.config)
    return fields if entry.spills else {k: v for k, v in fields.items() if k != "spills"}


def _apart(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1)) - math.log2(max(b, 1)))


def device_folder(device: str) -> str:
    """Return the folder of a device kind's tables."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
