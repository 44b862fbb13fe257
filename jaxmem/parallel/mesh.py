"""The device mesh of a run: its text form, its checks, and the axes `data fsdp tensor seq`."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.errors import ConfigError, unknown_name
from pallas_kernels._compat import make_mesh

AXES = ("data", "fsdp", "tensor", "seq")
"""Mesh axes in order: batch copies, parameter shards, head shards, sequence shards."""

BATCH_AXES = ("data", "fsdp")
"""Both carry different rows of the batch; `fsdp` also splits the parameters."""

BATCH_SPEC = PartitionSpec(BATCH_AXES)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over devices."""

    mesh: str = ""
    """Axis sizes such as `data=4,fsdp=2`; empty means one device."""

    def __post_init__(self) -> None:
        parse_mesh(self.mesh)

    @property
    def batch_shards(self) -> int:
        """Number of devices that each take different rows of the batch."""
        sizes = parse_mesh(self.mesh)
        return math.prod(sizes[axis] for axis in BATCH_AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=4,fsdp=2` into a size per axis, 1 where an axis is not named.

    Raises:
      UnknownName: an axis is none of `data fsdp tensor seq`.
      ConfigError: the text is malformed, or names an axis that cannot be split yet.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    seen: set[str] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        axis, equals, value = part.partition("=")
        axis = axis.strip()
        if not equals or not value.strip().isdigit() or int(value) < 1 or axis in seen:
            raise ConfigError(
                f"`parallel.mesh={text!r}`: {part!r} is not one axis with a size of at least 1. "
                "Write it like `data=4,fsdp=2`."
            )
        if axis not in AXES:
            raise unknown_name("mesh axis (`parallel.mesh`)", axis, AXES)
        seen.add(axis)
        sizes[axis] = int(value)
    for axis in ("tensor", "seq"):
        if sizes[axis] != 1:
            raise ConfigError(
                f"`parallel.mesh={text!r}`: splitting over {axis!r} is not built yet. "
                "Use `data` or `fsdp`."
            )
    return sizes


def build_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh from the first devices of the machine (of all machines, if there are several).

    Args:
      config: the axis sizes.
      devices: the devices to take from; None means all that JAX sees.

    Raises:
      ConfigError: the mesh asks for more devices than exist, or leaves a process without one.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = parse_mesh(config.mesh)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        kind = devices[0].platform
        hint = f"Ask for at most {len(devices)}."
        if kind == "cpu":
            hint = (
                f"Set XLA_FLAGS=--xla_force_host_platform_device_count={wanted} "
                f"to split the CPU, or ask for at most {len(devices)}."
            )
        raise ConfigError(
            f"`parallel.mesh={config.mesh!r}` needs {wanted} devices, found {len(devices)} "
            f"({kind}). {hint}"
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise ConfigError(
            f"`parallel.mesh={config.mesh!r}` uses {wanted} of {len(devices)} devices; with "
            f"{jax.process_count()} processes it must use all of them."
        )
    return make_mesh(tuple(sizes[axis] for axis in AXES), AXES, devices[:wanted])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the placement of a batch: rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the placement of a value that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def describe_mesh(mesh: Mesh) -> str:
    """Say in a few words what the mesh is, for the log head."""
    devices = mesh.devices.flatten()
    named = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = devices[0].device_kind
    visible = jax.device_count()
    unused = f" ({visible} visible)" if visible != len(devices) else ""
    flags = os.environ.get("XLA_FLAGS", "")
    forced = " (host CPU split by XLA_FLAGS)" if "host_platform_device_count" in flags else ""
    forced = forced if devices[0].platform == "cpu" and visible > 1 else ""
    plural = "s" if len(devices) > 1 else ""
    return f"{len(devices)} {kind} device{plural}{unused}{forced}, mesh {named or 'none'}"
