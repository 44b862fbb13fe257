"""What the compiler made of every kernel call: a file beside each launch table, reviewed like it.

`tuned/<device kind>/<kernel>.lock.json` has a row for each entry of the table, case of the entry
and GPU of `DEVICES`: what `ptxas` said of the kernels, under the digest of their lowered text. A
test lowers every call and compares digests; it compiles nothing. `RENEW` is the command that
compiles what changed.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any, NamedTuple

import jax

import pallas_kernels
from pallas_kernels import _launch
from pallas_kernels._compat import ANY_GPU, kernel_texts, lower_for_cuda
from pallas_kernels._deviceless import describe
from pallas_kernels._launch import Case, Entry

DEVICES = ("NVIDIA A100", "NVIDIA H200")
"""One device of each generation that kernels are compiled for."""
RENEW = "python -m experiments.benchmark --compile-lock changed"
_COMPILER = ("jax", "jaxlib", "jax-cuda13-pjrt")
"""Packages that lower and compile; JAX demands that all are of one release."""

Key = tuple[str, str, int, int, int, str]


class Call(NamedTuple):
    """A case of an entry of a launch table."""

    kernel: str
    entry: Entry
    case: Case


class Row(NamedTuple):
    """What the compiler made of a call on a device."""

    device: str
    dtype: str
    width: int
    length: int
    rows: int
    case: str
    text: str
    """Digest of what was compiled."""
    ptxas: str
    """Version of the assembler, which is the machine's and not the plugin's."""
    kernels: dict[str, dict[str, int]]
    """Of each kernel, in order: registers of a thread, bytes spilled, bytes of shared memory, and
    threads of a program."""

    @property
    def key(self) -> Key:
        """Return what tells this row from the others of its file."""
        return (self.device, self.dtype, self.width, self.length, self.rows, self.case)


class Lock(NamedTuple):
    """A lock file."""

    versions: dict[str, str]
    """Of the packages that lowered and compiled its rows."""
    rows: dict[Key, Row]


def tables() -> list[tuple[str, str]]:
    """Return (kernel, folder) of every launch table."""
    found = sorted(folder.name for folder in _launch.TABLES.iterdir() if folder.is_dir())
    names = pallas_kernels.names()
    return [(name, folder) for name in names for folder in found if _launch.entries(name, folder)]


def launches(kernel: str, folder: str) -> list[Entry]:
    """Return the entries of a table, and the first of each dtype for the narrowest heads."""
    table = _launch.entries(kernel, folder)
    first = {entry.dtype: entry for entry in reversed(table)}
    narrow = [entry._replace(width=16) for entry in first.values()]
    return table + [entry for entry in narrow if entry not in table]


def calls(kernel: str, folder: str) -> list[Call]:
    """Return every call that has rows in the lock file of a table."""
    cases = pallas_kernels.cases_of(kernel).cases
    return [Call(kernel, e, case) for e in launches(kernel, folder) for case in cases(e)]


def key(call: Call, device: str) -> Key:
    """Return the key of the row of a call on a device."""
    entry = call.entry
    return (device, entry.dtype, entry.width, entry.length, entry.rows, call.case.name)


def lower(call: Call) -> list[tuple[str, str]]:
    """Return names and texts of the kernels of a call; they are the same for every GPU."""
    with jax.default_matmul_precision(None):  # as in a process that sets nothing
        lowered = lower_for_cuda(call.case.function, *call.case.operands, kind=ANY_GPU)
    return kernel_texts(lowered)


def digest(texts: Iterable[tuple[str, str]], device: str) -> str:
    """Return the digest of the texts of a call's kernels, and of what is said of the device."""
    said = "\n".join([describe(device), *(text for _, text in texts)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the packages that lower and compile, of those that are installed."""
    installed = {}
    for package in _COMPILER:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def read(kernel: str, folder: str) -> Lock:
    """Read the lock file of a table; it is empty if there is none.

    Raises:
      ValueError: the file is damaged.
    """
    path = _path(kernel, folder)
    if not path.exists():
        return Lock({}, {})
    try:
        found = json.loads(path.read_text("utf-8"))
        rows = [Row(**row) for row in found["rows"]]
        return Lock(dict(found["versions"]), {row.key: row for row in rows})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} of {folder} is damaged: {error!r}. Delete it and run {RENEW}"
        ) from error


def write(kernel: str, folder: str, lock: Lock) -> None:
    """Write the lock file of a table, a line for each row, in the order of the calls."""
    keys = [key(call, device) for call in calls(kernel, folder) for device in DEVICES]
    rows = [json.dumps(lock.rows[each]._asdict()) for each in keys if each in lock.rows]
    head = f'{{"versions": {json.dumps(lock.versions)}, "rows": ['
    text = "\n  " + ",\n  ".join(rows) + "\n" if rows else ""
    path = _path(kernel, folder)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f"{head}{text}]}}\n", encoding="utf-8")
    unfinished.replace(path)


def compared(lock: Lock) -> bool:
    """Say whether digests made here may be compared with those of a lock file."""
    found = versions()
    return found == {name: lock.versions.get(name) for name in found}


def unknown_compiler(lock: Lock) -> str | None:
    """Say that the rows of a lock file are those of another compiler than is here, or None."""
    if compared(lock):
        return None
    return (
        f"The lock files are those of {_listed(lock.versions)}, and here is {_listed(versions())}: "
        "what it makes of the kernels is not known. Renew the files with the newest JAX and review "
        f"what changed: {RENEW}"
    )


def demand_this_compiler() -> None:
    """Check that digests are compared here, with every lock file.

    Raises:
      RuntimeError: they are not.
    """
    for said in {unknown_compiler(read(*table)) for table in tables()} - {None}:
        raise RuntimeError(said)


def older(lock: Lock) -> bool:
    """Say whether the JAX that is here came before the one of a lock file."""
    return _numbers(versions()["jax"]) < _numbers(lock.versions.get("jax", ""))


def misplaced(kernel: str, folder: str) -> str | None:
    """Say which rows a lock file lacks and which are of no call, or None; nothing is lowered."""
    wanted = [key(call, device) for call in calls(kernel, folder) for device in DEVICES]
    rows = read(kernel, folder).rows
    missing = [each for each in wanted if each not in rows]
    superfluous = [each for each in rows if each not in set(wanted)]
    said = [
        f"{len(keys)} {what}, the first {_named(keys[0])}"
        for keys, what in ((missing, "missing"), (superfluous, "of no call"))
        if keys
    ]
    return _renew(kernel, folder, said)


def stale(call: Call, folder: str) -> str | None:
    """Lower a call and say how it differs from its rows in the lock file, or None.

    Where JAX is another one than that of the file, names of kernels are compared, not digests.
    """
    lock, texts = read(call.kernel, folder), lower(call)
    said = []
    for device in DEVICES:
        row = lock.rows.get(key(call, device))
        names = [name for name, _ in texts]
        if row is None:
            said.append(f"{_named(key(call, device))} is missing")
        elif names != list(row.kernels):
            said.append(f"{_named(row.key)} has {', '.join(row.kernels)}, not {', '.join(names)}")
        elif compared(lock) and row.text != digest(texts, device):
            said.append(f"{_named(row.key)} is stale, its text changed")
    return _renew(call.kernel, folder, said)


def spilling(kernel: str, folder: str) -> str | None:
    """Say which rows of a lock file spill registers without an excuse of their entry, or None."""
    rows = read(kernel, folder).rows
    said = []
    for call in calls(kernel, folder):
        for device in DEVICES:
            row = rows.get(key(call, device))
            for name, use in {} if row is None or call.entry.spills else row.kernels.items():
                if use["spill_bytes"]:
                    spilled = f"{use['spill_bytes']} bytes"
                    said.append(f"{_named(key(call, device))} spills {spilled} in {name}")
    if not said:
        return None
    return (
        f"{'; '.join(said)}. Choose smaller tiles or more warps in {folder}/{kernel}.json, "
        "or say in the field `spills` of the entry why it must."
    )


def _path(kernel: str, folder: str) -> Any:
    return _launch.TABLES / folder / f"{kernel}.lock.json"


def _renew(kernel: str, folder: str, said: list[str]) -> str | None:
    if not said:
        return None
    return f"Rows of {folder}/{kernel}.lock.json: {'; '.join(said)}. Renew them: {RENEW}"


def _named(row: Key) -> str:
    device, dtype, width, length, rows, case = row
    return f"{case} {dtype} width {width} length {length} rows {rows} on {device}"


def _listed(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items()) or "no compiler"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
