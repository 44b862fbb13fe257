"""What the kernels of the persistent read share: logits and dropout of one tile."""

from typing import Any, NamedTuple

from jax import Array

from pallas_kernels import _dropout
from pallas_kernels._compat import Precision, mm
from pallas_kernels._tiles import LOG2_E


class Call(NamedTuple):
    """What is static in a call."""

    rows: int
    """Queries, M."""
    heads: int
    pairs: int
    """Stored pairs per table, P."""
    width: int
    """Key width, K."""
    value_width: int
    rate: float
    """Probability of dropping a weight."""
    precision: Precision | None
    interpret: bool


def product(a: Array, b: Array, call: Call, *, tb: bool = False) -> Array:
    """Multiply two tiles at the precision of values: TF32 where float32 is not asked for more."""
    return mm(a, b, tb=tb, precision=call.precision or "default", interpret=call.interpret)


def logits(a: Array, b: Array, scale: Array, call: Call) -> Array:
    """Return scale a bᵀ in units of log 2.

    Float32 queries come with scales up to e^10, which would magnify the error of TF32: unless
    another precision is asked for, the product takes three TF32 passes.
    """
    dots = mm(a, b, tb=True, precision=call.precision or "high", interpret=call.interpret)
    return dots * (scale * LOG2_E)


def kept(seed_ref: Any, table: Array, rows: Array, pairs: Array, call: Call) -> Array | None:
    """Return the dropout factors of a tile, or None without dropout.

    `table` is bank · H + head; `rows` and `pairs` are indices that broadcast to the tile.
    """
    if call.rate == 0.0:
        return None
    return _dropout.kept(seed_ref[0], seed_ref[1], table * call.rows + rows, pairs, call.rate)
