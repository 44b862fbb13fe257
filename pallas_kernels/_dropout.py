"""Dropout of weights as a function of their place, so that no mask is ever stored.

Whether a weight is kept is a hash of (seed, row, column) in 32-bit integers. Kernels and plain JAX
evaluate the same function: a forward pass, its backward pass and every implementation of an op see
one mask, whatever their tiles are.
"""

import jax
import jax.numpy as jnp
from jax import Array

_GOLDEN = 0x9E3779B9


def dropout_seed(key: Array) -> Array:
    """Return the two words [2], uint32, that stand for a random key in `kept`."""
    return jax.random.bits(key, (2,), jnp.uint32)


def kept(low: Array, high: Array, rows: Array, columns: Array, rate: float) -> Array:
    """Return 1 / (1 - rate) where a weight is kept and 0 where it is dropped, float32.

    A row has a 32-bit state, hashed from the seed; a weight is the finaliser of that state plus a
    Weyl sequence over the columns, as in SplitMix.

    Args:
      low: first word of the seed, a scalar; see `dropout_seed`.
      high: second word of the seed.
      rows: index of each row among all rows of the call (batch, head, token), int32.
      columns: index of each column, int32; broadcast against `rows`.
      rate: probability of a drop, in [0, 1); static.

    Reference: Steele, Lea, Flood 2014 (SplitMix); the finaliser is MurmurHash3's `fmix32`.
    """
    state = _mix(_mix(rows.astype(jnp.uint32) ^ low) + high)
    bits = _mix(state + columns.astype(jnp.uint32) * jnp.uint32(_GOLDEN))
    dropped = bits < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(dropped, jnp.float32(0.0), jnp.float32(1.0 / (1.0 - rate)))


def _mix(bits: Array) -> Array:
    bits = (bits ^ (bits >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> jnp.uint32(16))
