"""Checksums of the arrays of a checkpoint, the same on every mesh.

A flipped bit in a file that keeps its length is read back without complaint, so each checkpoint
carries a sum of every array. It is taken on the devices: nothing is copied to the host for it, and
an array that is spread over several processes has one all the same.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Items = Mapping[str, Mapping[str, jax.Array]]
"""Arrays by item of the checkpoint and by name."""


def checksums(items: Items) -> dict[str, dict[str, int]]:
    """Return the checksum of every array."""
    # All are started before the first is waited for.
    sums = {item: {n: checksum(x) for n, x in leaves.items()} for item, leaves in items.items()}
    return jax.tree.map(int, jax.device_get(sums))


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """Return sum_i mix(bits_i + i c) mod 2**32 over all elements i in row-major order, uint32.

    `mix` is one-to-one, so a change of a single element always changes the sum; whole-number
    addition does not depend on the order, hence not on how the array is spread.
    """
    words = _words(array)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The constants are those of MurmurHash3's last step; c is 2**32 / golden ratio, made odd.
    x = words + index * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)


def damaged(items: Items, expected: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Name the arrays whose checksum is not the expected one."""
    return [
        f"{item}/{name}"
        for item, leaves in checksums(items).items()
        for name, found in leaves.items()
        if found != expected.get(item, {}).get(name)
    ]


def json_checksum(value: Any) -> int:
    """Return the CRC-32 of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _words(array: jax.Array) -> jax.Array:
    """Return the bits of each element as uint32; wider elements become several."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
