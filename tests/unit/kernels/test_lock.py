"""Every call of the launch tables lowers for CUDA, and what was compiled of it is what it is now.

Nothing is compiled here. `tests/deviceless` shows that the compiler is read rightly.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from jaxmem.errors import ConfigError
from jaxmem.reports.benchmark.compiled import renew
from pallas_kernels import _launch, _lock
from pallas_kernels._compat import ANY_GPU, kernel_texts, launch, load, lower_for_cuda, pl, store
from pallas_kernels._deviceless import KernelUse
from pallas_kernels._launch import Entry, shared_limit, target

ROOT = Path(pallas_kernels.__file__).parent
RENEW = "Renew them: python -m experiments.benchmark --compile-lock changed"


def lowered_here(kernel: str, folder: str) -> list[Entry]:
    """Return the entries of a table whose calls are lowered in this process.

    All of them, where digests are compared. Another JAX only shows that it lowers the kernels at
    all: entries that have every dtype, width and length among them are enough.
    """
    entries = _lock.launches(kernel, folder)
    if _lock.compared(_lock.read(kernel, folder)):
        return entries

    def values(entry: Entry) -> set[object]:
        return {entry.dtype, entry.width, (entry.length, entry.rows)}

    rest, chosen = set().union(*map(values, entries)), []
    while rest:
        chosen.append(max(entries, key=lambda entry: len(values(entry) & rest)))
        rest -= values(chosen[-1])
    return chosen


ENTRIES = [
    (kernel, folder, entry)
    for kernel, folder in _lock.tables()
    for entry in lowered_here(kernel, folder)
]


def label(value: object) -> str | None:
    if isinstance(value, Entry):
        return f"{value.dtype}-w{value.width}-t{value.length}-r{value.rows}"
    return None


def test_every_kernel_has_a_table():
    assert {kernel for kernel, _ in _lock.tables()} == set(pallas_kernels.names())


@pytest.mark.parametrize(("kernel", "folder"), _lock.tables())
def test_every_call_has_rows_and_every_row_a_call(kernel: str, folder: str):
    assert _lock.misplaced(kernel, folder) is None


@pytest.mark.parametrize(("kernel", "folder"), _lock.tables())
def test_no_kernel_spills(kernel: str, folder: str):
    assert _lock.spilling(kernel, folder) is None


@pytest.mark.parametrize(("kernel", "folder"), _lock.tables())
def test_the_compiler_is_not_newer_than_the_rows(kernel: str, folder: str):
    """An older one, on Python 3.11, has no rows: only names of kernels are compared there."""
    lock = _lock.read(kernel, folder)
    if not _lock.older(lock):
        assert _lock.unknown_compiler(lock) is None


@pytest.mark.parametrize(("kernel", "folder", "entry"), ENTRIES, ids=label)
def test_entries_lower_to_what_was_compiled(kernel: str, folder: str, entry: Entry):
    mine = [call for call in _lock.calls(kernel, folder) if call.entry == entry]
    assert mine
    assert [_lock.stale(call, folder) for call in mine] == [None] * len(mine)


@pytest.mark.parametrize("kernel", pallas_kernels.names())
def test_texts_are_the_same_for_every_gpu(kernel: str):
    case = _lock.calls(kernel, "default")[0].case
    texts = [
        kernel_texts(lower_for_cuda(case.function, *case.operands, kind=kind))
        for kind in (*_lock.DEVICES, ANY_GPU)
    ]
    assert texts[0] == texts[1] == texts[2]


def scaled(x: jax.Array, factor: float) -> jax.Array:
    def kernel(x_ref: Any, y_ref: Any) -> None:
        store(y_ref.at[:], factor * load(x_ref.at[:]))

    whole = pl.BlockSpec(x.shape, lambda i: (0,))
    return launch(
        kernel,
        name="scaled",
        grid=(1,),
        in_specs=[whole],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_warps=1,
        num_stages=1,
        interpret=False,
    )(x)


def test_a_kernel_that_asks_for_the_gpu_cannot_be_locked():
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    for ask in (shared_limit, lambda gpu: len(gpu.kind)):

        def kernel(x: jax.Array, ask: Any = ask) -> jax.Array:
            return scaled(x, float(ask(target())))

        lower_for_cuda(kernel, x, kind="NVIDIA A100")
        with pytest.raises(RuntimeError, match=r"asks for which GPU it is lowered"):
            lower_for_cuda(kernel, x, kind=ANY_GPU)


DIGESTS = """
from pallas_kernels import _lock
for call in _lock.calls("leaky_average", "default")[:2]:
    print(_lock.digest(_lock.lower(call), "NVIDIA A100"))
"""


def test_digests_are_the_same_in_another_process_and_place(tmp_path: Path):
    """Where the files stand, and on which lines, is no part of a text; a number in a kernel is."""
    here = [
        _lock.digest(_lock.lower(call), "NVIDIA A100")
        for call in _lock.calls("leaky_average", "default")[:2]
    ]
    shutil.copytree(ROOT, tmp_path / "elsewhere" / "pallas_kernels")
    for path in (tmp_path / "elsewhere").rglob("*.py"):
        path.write_text("# A line above.\n\n" + path.read_text("utf-8"), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere"), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", "-c", DIGESTS]
    there = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == here
    assert here[0] != here[1]
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    two, three = (
        kernel_texts(lower_for_cuda(functools.partial(scaled, factor=factor), x))
        for factor in (2.0, 3.0)
    )
    assert two != three
    assert _lock.digest(two, "NVIDIA A100") != _lock.digest(two, "NVIDIA H200")


SMALL = {"rows": 1, "block": 16, "programs": 4, "span": 16, "num_warps": 1, "num_stages": 1}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of the gated scan with one small entry, lowered to the name of its case."""
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    (tmp_path / "default").mkdir()
    write_table(tmp_path)

    def lower(call: _lock.Call) -> list[tuple[str, str]]:
        return [(call.case.name, f"{call.case.name} {call.entry.config}")]

    monkeypatch.setattr(_lock, "lower", lower)
    return tmp_path


def write_table(tables: Path, spills: str = "", **config: int) -> None:
    entry = Entry("float32", 16, 64, 4, SMALL | config, spills)
    text = json.dumps([_launch.as_json(entry)])
    (tables / "default" / "gated_scan.json").write_text(text)


class Compiler:
    """What stands in for the compiler, and for which calls it was asked."""

    def __init__(self, spill_bytes: int = 0, refused: str = ""):
        self.spill_bytes, self.refused = spill_bytes, refused
        self.asked: list[tuple[str, str]] = []

    def __call__(self, call: _lock.Call, device: str) -> Future[list[KernelUse]]:
        name, job = call.case.name, Future()
        self.asked.append((name, device))
        if name == self.refused:
            job.set_exception(jax.errors.JaxRuntimeError("Shared memory size limit exceeded\nat"))
        else:
            use = KernelUse(name, (1,), 32, 1000, 64, self.spill_bytes, "13.0.88")
            job.set_result([use._replace(name="fusion"), use])
        return job


def renewed(compiler: Compiler, which: Any = "changed") -> list[Any]:
    return list(renew("gated_scan", "default", compiler, which))


def call() -> _lock.Call:
    return _lock.calls("gated_scan", "default")[0]


def edit(**fields: Any) -> None:
    """Write the first row, of `call()` on an A100, with other fields."""
    lock = _lock.read("gated_scan", "default")
    key = _lock.key(call(), "NVIDIA A100")
    lock.rows[key] = lock.rows[key]._replace(**fields)
    _lock.write("gated_scan", "default", lock)


def complaints() -> list[str | None]:
    place = ("gated_scan", "default")
    return [_lock.misplaced(*place), _lock.stale(call(), "default"), _lock.spilling(*place)]


def test_a_row_for_each_call_and_device_a_line_each(tables: Path):
    rows = renewed(compiler := Compiler())
    assert len(rows) == len(compiler.asked) == 8
    assert complaints() == [None, None, None]
    lines = (tables / "default" / "gated_scan.lock.json").read_text().splitlines()
    assert len(lines) == 1 + 8 + 1
    assert json.loads(lines[0] + "]}")["versions"]["jax"] == jax.__version__
    assert json.loads(lines[1].rstrip(",")) == {
        "device": "NVIDIA A100",
        "dtype": "float32",
        "width": 16,
        "length": 64,
        "rows": 4,
        "case": "gated_forward",
        "text": _lock.digest(_lock.lower(call()), "NVIDIA A100"),
        "ptxas": "13.0.88",
        "kernels": {
            "gated_forward": {
                "registers": 64,
                "spill_bytes": 0,
                "shared_bytes": 1000,
                "threads": 32,
            }
        },
    }


def test_only_what_changed_is_compiled_and_all_on_request(tables: Path):
    renewed(Compiler())
    assert renewed(nothing := Compiler()) == nothing.asked == []
    edit(text="0")
    renewed(one := Compiler())
    assert one.asked == [("gated_forward", "NVIDIA A100")]
    renewed(everything := Compiler(), "all")
    assert len(everything.asked) == 8
    write_table(tables, num_warps=2)
    renewed(changed := Compiler())
    assert len(changed.asked) == 8


def test_an_interrupted_renewal_keeps_what_it_had(tables: Path):
    rows = renew("gated_scan", "default", Compiler(), "all")
    first = next(rows)
    rows.close()
    assert list(_lock.read("gated_scan", "default").rows.values()) == [first]
    renewed(rest := Compiler())
    assert len(rest.asked) == 7
    assert complaints() == [None, None, None]


def test_missing_stale_and_superfluous_rows_are_told(tables: Path):
    named = "gated_forward float32 width 16 length 64 rows 4 on NVIDIA A100"
    start = "Rows of default/gated_scan.lock.json: "
    missing, stale, _ = complaints()
    assert missing == f"{start}8 missing, the first {named}. {RENEW}"
    assert (stale or "").startswith(f"{start}{named} is missing; ")
    renewed(Compiler())
    edit(text="0")
    assert complaints() == [None, f"{start}{named} is stale, its text changed. {RENEW}", None]
    edit(kernels={"gated_ends": {"spill_bytes": 0}})
    said = f"{start}{named} has gated_ends, not gated_forward. {RENEW}"
    assert complaints() == [None, said, None]
    path = tables / "default" / "gated_scan.lock.json"
    path.write_text(path.read_text().replace('"length": 64', '"length": 65'))
    said = f"{start}8 missing, the first {named}; 8 of no call, the first "
    assert (complaints()[0] or "").startswith(said + named.replace("64", "65"))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"gated_scan\.lock\.json of default is damaged"):
        complaints()


def test_a_spilling_row_needs_a_reason_in_its_entry(tables: Path):
    renewed(Compiler(spill_bytes=24))
    _, _, spilling = complaints()
    assert "gated_forward float32 width 16 length 64 rows 4 on NVIDIA A100 spills 24 bytes" in (
        spilling or ""
    )
    assert "Choose smaller tiles or more warps in default/gated_scan.json" in (spilling or "")
    write_table(tables, spills="its sums do not fit")
    assert complaints() == [None, None, None]


def test_a_call_that_does_not_compile_has_no_row(tables: Path):
    refused = [row for row in renewed(Compiler(refused="gated_backward")) if isinstance(row, str)]
    assert len(refused) == 2
    assert all("gated_backward: Shared memory size limit exceeded" in said for said in refused)
    assert "2 missing, the first gated_backward" in (complaints()[0] or "")


@pytest.fixture
def other_jax(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    return lambda version: monkeypatch.setattr(_lock, "versions", lambda: {"jax": version})


def test_another_compiler_is_not_trusted(tables: Path, other_jax: Any):
    other_jax("0.12.0")
    renewed(Compiler())
    lock = _lock.read("gated_scan", "default")
    assert (_lock.older(lock), _lock.unknown_compiler(lock)) == (False, None)
    edit(text="0")
    other_jax("0.12.10")
    assert not _lock.older(lock)
    said = _lock.unknown_compiler(lock)
    assert said is not None
    with pytest.raises(RuntimeError, match=r"^The lock files are those of jax 0\.12\.0, and"):
        _lock.demand_this_compiler()
    assert said.startswith("The lock files are those of jax 0.12.0, and here is jax 0.12.10")
    assert "--compile-lock changed" in said
    assert complaints() == [None, None, None]  # digests of two versions say nothing
    renewed(newer := Compiler())
    assert len(newer.asked) == 8
    other_jax("0.12.9")
    assert _lock.older(_lock.read("gated_scan", "default"))
    with pytest.raises(ConfigError, match=r"here is jax 0\.12\.9.*with the newest JAX"):
        renewed(Compiler())
