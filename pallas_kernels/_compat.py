"""The single place that knows the differences between JAX 0.10.2 and 0.12.x."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(shape: Sequence[int], names: Sequence[str], devices: Sequence[jax.Device]) -> Mesh:
    """Build a mesh whose axes are `Auto`.

    The shape is positional because its keyword changed (`axis_shapes` on 0.10, `axis_sizes` from
    0.11), and the axis types are explicit because `jax.make_mesh` defaults to `Explicit`, under
    which `shard_map` rejects arrays that were placed elsewhere.
    """
    types = (AxisType.Auto,) * len(tuple(names))
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=types, devices=tuple(devices))
