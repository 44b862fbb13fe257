"""Differences between JAX versions stay behind one door."""

import ast
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from pallas_kernels._compat import make_mesh

ROOT = Path(__file__).parents[3]


def test_mesh_has_auto_axes_in_the_order_given():
    devices = jax.devices()[:6]
    mesh = make_mesh([2, 3], ["data", "fsdp"], devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 3}
    assert tuple(mesh.axis_types) == (AxisType.Auto, AxisType.Auto)
    assert set(np.ravel(mesh.devices)) == set(devices)


def test_nobody_else_makes_meshes_or_asks_for_the_version():
    for path in [p for folder in ("jaxmem", "experiments") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("jax", "make_mesh"), path
                assert (node.value.id, node.attr) != ("jax", "__version_info__"), path
