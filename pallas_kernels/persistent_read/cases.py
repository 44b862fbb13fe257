"""The kernels of the persistent read at the shapes of a table's entries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.persistent_read._tiles import Operands, Saved
from pallas_kernels.persistent_read.backward import queries_gradient, tables_gradient
from pallas_kernels.persistent_read.forward import forward
from pallas_kernels.persistent_read.launch import PersistentReadConfig

PAIRS = 1000
"""Stored pairs; not a multiple of any tile, so that the last one is masked."""
RATE = 0.1
KERNELS = {
    "persistent_read_forward": forward,
    "persistent_read_queries_gradient": queries_gradient,
    "persistent_read_tables_gradient": tables_gradient,
}


def cases(entry: Entry) -> list[Case]:
    """Return the three kernels launched as the entry says: in training, and over two banks.

    The latter are without dropout, their values are narrower than the keys, and those of float32
    keys are of half precision, as a model trained in it calls them.
    """
    return _cases(entry, "") + _cases(entry, "_banks")


def _cases(entry: Entry, suffix: str) -> list[Case]:
    several = bool(suffix)
    rows, heads, width = entry.length, entry.rows, entry.width
    banks, value_width = (2, width * 3 // 4) if several else (1, width)
    wide, dtype = jnp.dtype(jnp.float32), jnp.dtype(entry.dtype)
    value_dtype = jnp.dtype(jnp.bfloat16) if several and dtype == wide else dtype

    def operand(*shape: int, of: Any = wide) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    per_row = operand(banks, heads, rows)
    operands = Operands(
        operand(rows, heads, width, of=dtype),
        operand(banks, heads, PAIRS, width, of=dtype),
        operand(banks, heads, PAIRS, value_width, of=value_dtype),
        operand(heads),
        None if several else operand(2, of=jnp.dtype(jnp.uint32)),
    )
    saved = Saved(per_row, operand(rows, heads, value_width, of=value_dtype), per_row)
    options = {
        "rate": 0.0 if several else RATE,
        "precision": None,
        "config": PersistentReadConfig(**entry.config),
        "interpret": False,
    }
    return [
        Case(
            name + suffix,
            functools.partial(kernel, **options),
            (operands,) if kernel is forward else (operands, saved),
        )
        for name, kernel in KERNELS.items()
    ]
