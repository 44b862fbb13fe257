"""Real compilation for a GPU that is not there: what fits, what spills, how much memory is used.

The CUDA plugin of JAX compiles without a driver, a device or the CUDA toolkit; two wheels next to
JAX are enough (extra `aot`). Set JAX_PLATFORMS=cpu, or JAX looks for a GPU first and logs at length
that there is none.
"""

import re
import tempfile
from collections.abc import Callable
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
    """Compile a function and return what each of its kernels takes.

    Raises:
      as `compile_for`.
    """
    with tempfile.TemporaryDirectory() as folder:
        compile_for(kind, function, *operands, options={"xla_dump_to": folder})
        plans = [p.read_text("utf-8") for p in Path(folder).glob("*.thunk_sequence.txt")]
    return [_use(*found) for plan in plans for found in _KERNEL.findall(plan)]


_KERNEL = re.compile(
    r"kCustomKernel.*?(\w+) grid: \[(.*?)\] threads: \[(\d+),.*?\]\s+shared_memory: (\d+) bytes"
)


def _use(name: str, grid: str, threads: str, shared: str) -> KernelUse:
    return KernelUse(name, tuple(int(n) for n in grid.split(",")), int(threads), int(shared))


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
