"""The kernels of the persistent read at the shapes of a table's entries."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.persistent_read.backward import queries_gradient, tables_gradient
from pallas_kernels.persistent_read.forward import forward
from pallas_kernels.persistent_read.launch import PersistentReadConfig

PAIRS = 1000
"""Stored pairs; not a multiple of any tile, so that the last one is masked."""
RATE = 0.1


def cases(entry: Entry) -> list[Case]:
    """Return the three kernels, with dropout, launched as the entry says."""
    rows, heads, width = entry.length, entry.rows, entry.width
    dtype = jnp.dtype(entry.dtype)

    def operand(shape: tuple[int, ...], of: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    wide = jnp.dtype(jnp.float32)
    reads = operand((rows, heads, width), dtype)
    table = operand((1, heads, PAIRS, width), dtype)
    per_row = operand((1, heads, rows), wide)
    inputs = (reads, table, table, operand((heads,), wide), operand((2,), jnp.dtype(jnp.uint32)))
    options = functools.partial(
        functools.partial,
        rate=RATE,
        precision=None,
        config=PersistentReadConfig(**entry.config),
        interpret=False,
    )
    backward = (*inputs, per_row, reads, per_row)
    return [
        Case("persistent_read_forward", options(forward), inputs),
        Case("persistent_read_queries_gradient", options(queries_gradient), backward),
        Case("persistent_read_tables_gradient", options(tables_gradient), backward),
    ]
