"""Real compilation for a GPU that is not there: what fits, what spills, how much memory is used.

The CUDA plugin of JAX (extra `aot`) compiles without a driver or a device. `ptxas` and `nvlink` are
those of the machine: XLA looks for them in the PATH, in /usr/local/cuda and in NVIDIA's wheels.
Set JAX_PLATFORMS=cpu, or JAX looks for a GPU first and logs at length that there is none.
"""

import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels._compat import stand_in_gpu

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class _Chip(NamedTuple):
    """What the compiler asks about a GPU, from its data sheet."""

    description: str
    capability: tuple[int, int]
    cores: int
    shared_per_core: int
    shared_per_block: int
    fpus_per_core: int
    bandwidth: int
    memory: int
    l2: int
    clock_ghz: float


_CHIPS = {
    "NVIDIA A100": _Chip(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        167936,
        166912,
        64,
        2039 * 10**9,
        80 << 30,
        40 << 20,
        1.41,
    ),
    "NVIDIA H100": _Chip(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        233472,
        232448,
        128,
        3352 * 10**9,
        80 << 30,
        50 << 20,
        1.98,
    ),
    "NVIDIA H200": _Chip(
        "NVIDIA H200", (9, 0), 132, 233472, 232448, 128, 4800 * 10**9, 141 << 30, 50 << 20, 1.98
    ),
}
DEVICES = tuple(_CHIPS)
"""Devices that can be compiled for."""


def missing() -> str | None:
    """Say why nothing can be compiled for a GPU here, or None."""
    for plugin in _PLUGINS:
        try:
            if find_spec(plugin) is not None:
                return None
        except ModuleNotFoundError:
            continue
    return "JAX's CUDA plugin is not installed: pip install 'jaxmem[aot]'"


class KernelUse(NamedTuple):
    """What one kernel of a compiled program takes."""

    name: str
    grid: tuple[int, ...]
    threads: int
    """Threads of one program."""
    shared_bytes: int
    """Shared memory of one program."""
    registers: int
    """Registers of one thread."""
    spill_bytes: int
    """Bytes of registers that the code stores to memory and loads again, of one thread."""
    ptxas: str
    """Version of the assembler."""

    def numbers(self) -> dict[str, int]:
        """Return what the compiler decides, by name."""
        names = ("registers", "spill_bytes", "shared_bytes", "threads")
        return {name: getattr(self, name) for name in names}


def workers(count: int | None = None) -> ProcessPoolExecutor:
    """Return processes in which `kernel_uses` works; None: one for each processor."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count or os.cpu_count(), spawn, initializer=_set_up)


def _set_up() -> None:
    """Have XLA log what `ptxas` says; read when the plugin is loaded, which this comes before."""
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=3"}
    jax.config.update("jax_default_matmul_precision", None)  # as the texts of lock files have it


def compile_for(
    kind: str,
    function: Callable,
    *operands: Any,
    spills: bool = True,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compile a function, kernels included, for a GPU of this kind.

    `compiled.memory_analysis()` of the result tells the memory that a call needs.

    Args:
      kind: one of `DEVICES`.
      function: what to compile.
      operands: trees of `jax.ShapeDtypeStruct`s.
      spills: whether a kernel may spill registers; if not, one that does fails to compile.
      options: further compiler options of XLA.

    Raises:
      RuntimeError: the plugin is absent (see `missing`).
      jax.errors.JaxRuntimeError: the compiler refuses: too much shared memory, or register spills.
    """
    absent = missing()
    if absent:
        raise RuntimeError(absent)
    sharding = _device(kind)
    placed = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), operands
    )
    with stand_in_gpu(kind, _CHIPS[kind].cores):
        lowered = jax.jit(function).trace(*placed).lower()
    refuse = {} if spills else {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    return lowered.compile(compiler_options={**refuse, **(options or {})})


def kernel_uses(kind: str, function: Callable, *operands: Any) -> list[KernelUse]:
    """Compile a function as users get it and return what each of its kernels takes.

    Registers and spills stand only in the log of `ptxas`: call it in a process of `workers`.

    Raises:
      RuntimeError: the log does not tell of a kernel.
      and as `compile_for`.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_backend_optimization_level": 3}
        with _stderr(Path(folder) / "log"):
            compile_for(kind, function, *operands, options=options)
        log = (Path(folder) / "log").read_text("utf-8", errors="replace")
        plans = [p.read_text("utf-8") for p in Path(folder).glob("*.thunk_sequence.txt")]
    said = {name: numbers for name, *numbers in _SAID.findall(log)}
    called = _CALLED.search(log)
    found = [plan for text in plans for plan in _KERNEL.findall(text)]
    silent = [name for name, *_ in found if name not in said]
    if called is None or silent:
        raise RuntimeError(
            f"What ptxas says of {', '.join(silent)} is not in XLA's log. Call kernel_uses in a "
            "process of _deviceless.workers(); if that was done, this JAX logs otherwise."
        )
    return [_use(plan, said[plan[0]], _version(called[1])) for plan in found]


_KERNEL = re.compile(
    r"kCustomKernel.*?(\w+) grid: \[(.*?)\] threads: \[(\d+),.*?\]\s+shared_memory: (\d+) bytes"
)
_SAID = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
_CALLED = re.compile(r"\] (\S*ptxas) \S+ -o ")


def _use(plan: tuple[str, ...], said: list[str], ptxas: str) -> KernelUse:
    (name, grid, threads, shared), (stores, loads, registers) = plan, said
    return KernelUse(
        name,
        tuple(int(n) for n in grid.split(",")),
        int(threads),
        int(shared),
        int(registers),
        int(stores) + int(loads),
        ptxas,
    )


@contextlib.contextmanager
def _stderr(path: Path) -> Iterator[None]:
    """Write what goes to stderr, from outside of Python too, to a file."""
    shown = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


@cache
def _version(ptxas: str) -> str:
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else said.strip()


def describe(kind: str) -> str:
    """Return all that the compiler is told of a GPU."""
    return _target_config(_CHIPS[kind])


@cache
def _device(kind: str) -> NamedSharding:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        "gpu", platform="cuda", topology="1x1x1", target_config=_target_config(_CHIPS[kind])
    )
    return NamedSharding(Mesh(np.asarray(topology.devices[:1]), ("x",)), PartitionSpec())


def _target_config(chip: _Chip) -> str:
    """Return the text form of XLA's GpuTargetConfigProto."""
    major, minor = chip.capability
    fields: dict[str, Any] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": chip.shared_per_core,
        "threads_per_core_limit": 2048,
        "core_count": chip.cores,
        "fpus_per_core": chip.fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": chip.bandwidth,
        "l2_cache_size": chip.l2,
        "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": chip.memory,
        "shared_memory_per_block_optin": chip.shared_per_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    device = " ".join(f"{name}: {value}" for name, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {device} {capability} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }'
        f' device_description_str: "{chip.description}"'
    )
