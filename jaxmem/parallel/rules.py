"""Which axis of an array is split over which mesh axis."""

import math
from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec


def shard_axis(shape: tuple[int, ...], size: int, *, first: int = 0) -> int | None:
    """Choose the axis to split `size` ways: the largest divisible one, the earliest among equals.

    Args:
      shape: of the whole array.
      size: number of shards; 1 means nothing is split.
      first: axes before this one are never split (the layer axis of stacked parameters).

    Returns:
      The axis, or None if none is divisible (the array is then held whole by every device).
    """
    if size == 1:
        return None
    divisible = [
        axis for axis in range(first, len(shape)) if shape[axis] and not shape[axis] % size
    ]
    return max(divisible, key=lambda axis: (shape[axis], -axis), default=None)


def leaf_spec(shape: tuple[int, ...], fsdp: int, *, first: int = 0) -> PartitionSpec:
    """Return the spec of one parameter (or optimiser moment) under `fsdp` shards."""
    axis = shard_axis(shape, fsdp, first=first)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*(None,) * axis, "fsdp")


def split_axis(spec: PartitionSpec) -> int | None:
    """Return the axis that a spec of `leaf_spec` splits, None for a whole array."""
    return spec.index("fsdp") if "fsdp" in spec else None


def describe_shardings(
    shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, PartitionSpec], mesh: Mesh
) -> list[str]:
    """Return one line per kind of placement: how it is split, how many arrays, bytes per device."""
    lines = []
    for spec in sorted(set(specs.values()), key=str):
        names = [name for name in shapes if specs[name] == spec]
        local = sum(
            4 * math.prod(NamedSharding(mesh, spec).shard_shape(shapes[name])) for name in names
        )
        axis = split_axis(spec)
        what = "whole on every device" if axis is None else f"axis {axis} over fsdp"
        lines.append(f"{what}: {len(names)} arrays, {local / 2**20:.2f} MiB per device")
    return lines
