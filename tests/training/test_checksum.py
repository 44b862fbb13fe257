"""Checksums see every bit, and no layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmem.training.checksum import checksum, damaged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_every_element_and_its_place_count(dtype):
    base = np.arange(12).reshape(3, 4) % 2
    found = {int(checksum(jnp.asarray(base, dtype)))}
    for index in range(12):
        changed = base.copy()
        changed.flat[index] ^= 1
        found.add(int(checksum(jnp.asarray(changed, dtype))))
    found.add(int(checksum(jnp.asarray(base[:, ::-1], dtype))))
    assert len(found) == 14


def test_sum_is_that_of_the_formula_on_any_mesh():
    words = np.random.default_rng(0).integers(0, 2**32, (8, 4), dtype=np.uint32)
    x = words.ravel() + np.arange(32, dtype=np.uint32) * np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    want = int((x ^ (x >> np.uint32(16))).sum(dtype=np.uint32))
    mesh = jax.make_mesh((8,), ("rows",))
    spread = jax.device_put(words, NamedSharding(mesh, PartitionSpec("rows")))
    assert int(checksum(jnp.asarray(words))) == int(checksum(spread)) == want
    assert damaged({"a": {"w": spread, "v": spread}}, {"a": {"w": want, "v": 1}}) == ["a/v"]
