"""Loads and stores of tiles that may reach over the end of an array."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import load, pl, store

LOG2_E = 1.4426950408889634


def softmax_weights(logit: Array, maximum: Array) -> Array:
    """Return 2^(logit - maximum), at most 1.

    `maximum` is a row's largest logit or its log-sum-exp, in units of log 2 as the logits. It comes
    from logits whose last bit may differ from that of these: the compiler contracts
    scale q·k - maximum in one place and not in another, and the backward pass multiplies in another
    order. At a scale of e^22 that bit is worth 2^9, and 2^(2^9) is infinite. The largest
    weight, and with it a sum of weights, may be below 1 for the same reason.
    """
    return jnp.exp2(jnp.minimum(logit - maximum, 0.0))


def along(values: Array, axis: int) -> Array:
    """Lay numbers [N] along one of the two axes of a tile, [N 1] or [1 N]."""
    return jnp.expand_dims(values, 1 - axis)


def tile(
    ref: Any,
    start: Any,
    size: int,
    rows: Any,
    width: int,
    *,
    lead: tuple = (),
    head: tuple = (),
) -> Array:
    """Load [size, block width] from row `start`, zero from row `rows` and column `width` on.

    Args:
      ref: reference [..., rows, (heads), block width].
      start: first row.
      size: of the tile.
      rows: how many there are.
      width: of the array; its block is padded to a power of two.
      lead: indices of axes before the rows.
      head: index of an axis between rows and columns.
    """
    part = ref.at[(*lead, pl.ds(start, size), *head, slice(None))]
    return load(part, inside(start, size, rows)[:, None] & _columns(ref, width))


def vector(ref: Any, start: Any, size: int, rows: Any, *, lead: tuple = ()) -> Array:
    """Load [size] from row `start`, zero from row `rows` on; `lead`: indices before the rows."""
    return load(ref.at[(*lead, pl.ds(start, size))], inside(start, size, rows), 0)


def store_tile(ref: Any, values: Array, start: Any, rows: Any, width: int) -> None:
    """Store a block [size, block width] whose first row is `start`, up to `rows` and `width`."""
    mask = inside(start, ref.shape[0], rows)[:, None] & _columns(ref, width)
    store(ref.at[:, :], values, mask)


def inside(start: Any, size: int, rows: Any) -> Array:
    """Return which of `size` rows from `start` on are below `rows`, bool [size]."""
    return start + lax.iota(jnp.int32, size) < rows


def _columns(ref: Any, width: int) -> Array:
    return (lax.iota(jnp.int32, ref.shape[-1]) < width)[None, :]
