"""What the kernels of the persistent read share: logits and dropout of one tile."""

from typing import Any, NamedTuple

from jax import Array

from pallas_kernels import _dropout
from pallas_kernels._compat import Precision, mm, pl
from pallas_kernels._tiles import LOG2_E


class Operands(NamedTuple):
    """The arrays of a call."""

    q: Any
    """Queries [M H K]."""
    keys: Any
    """Stored keys [R H P K], of the queries' dtype."""
    values: Any
    """Stored values [R H P V]."""
    scale: Any
    """Factor of the logits [H], float32 or wider."""
    seed: Any = None
    """Words of the dropout's seed [2], uint32; None without dropout."""


class Saved(NamedTuple):
    """What a backward pass knows of the queries."""

    lse: Any
    """Logarithms to base 2 of the denominators [R H M], float32."""
    dy: Any
    """Cotangent of each bank's read, one for all banks [M H V], of the values' dtype."""
    delta: Any
    """Δ = <dy, y> [R H M], float32."""


class Call(NamedTuple):
    """What is static in a call."""

    rows: int
    """Queries, M."""
    heads: int
    banks: int
    pairs: int
    """Stored pairs per table, P."""
    width: int
    """Key width, K."""
    value_width: int
    rate: float
    """Probability of dropping a weight."""
    precision: Precision | None
    interpret: bool


def call_of(operands: Operands, rate: float, precision: Precision | None, interpret: bool) -> Call:
    """Describe a call."""
    rows, heads, width = operands.q.shape
    banks, _, pairs, value_width = operands.values.shape
    return Call(rows, heads, banks, pairs, width, value_width, rate, precision, interpret)


def shared_specs(operands: Operands) -> tuple[Any, Any]:
    """Return the blocks of scale and seed in a grid whose second axis is that of heads."""
    seed = None if operands.seed is None else pl.BlockSpec((2,), lambda *grid: (0,))
    return pl.BlockSpec((1,), lambda i, h, *grid: (h,)), seed


def product(a: Array, b: Array, call: Call, *, tb: bool = False) -> Array:
    """Multiply two tiles at the precision of values: TF32 where float32 is not asked for more."""
    return mm(a, b, tb=tb, precision=call.precision or "default", interpret=call.interpret)


def logits(a: Array, b: Array, scale: Array, call: Call) -> Array:
    """Return scale a bᵀ in units of log 2.

    Scales may be as large as e^22 (Memory Mosaics), which would magnify the error of TF32: unless
    another precision is asked for, float32 takes three TF32 products here.
    """
    dots = mm(a, b, tb=True, precision=call.precision or "high", interpret=call.interpret)
    return dots * (scale * LOG2_E)


def dropout_mask(
    seed_ref: Any, table: Array, rows: Array, pairs: Array, call: Call
) -> Array | None:
    """Return the dropout factors of a tile, or None without dropout.

    `table` is bank · H + head; `rows` and `pairs` are indices that broadcast to the tile.
    """
    if call.rate == 0.0:
        return None
    return _dropout.kept(seed_ref[0], seed_ref[1], table * call.rows + rows, pairs, call.rate)
