"""The kernels of squared attention at the shapes of a table's entries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.pairs import Decay, PairTiles
from pallas_kernels.squared_attention._tiles import Operands, Outputs
from pallas_kernels.squared_attention.backward import squared_backward
from pallas_kernels.squared_attention.forward import squared_forward


def cases(entry: Entry) -> list[Case]:
    """Return both passes launched as the entry says, plain and with decay and documents."""
    return _cases(entry, full=False) + _cases(entry, full=True)


def _cases(entry: Entry, *, full: bool) -> list[Case]:
    heads = min(entry.rows, 16)
    batch = max(entry.rows // heads, 1)
    dtype = jnp.dtype(entry.dtype)

    def operand(*shape: int, of: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(of))

    x = operand(batch, entry.length, heads, entry.width, of=dtype)
    exponents = operand(batch, heads, entry.length)
    operands = Operands(
        *(x, x, x),
        Decay(exponents, exponents, exponents, exponents) if full else None,
        operand(batch, entry.length, of=jnp.int32) if full else None,
    )
    dy = operand(*x.shape, of=jnp.float32 if dtype == jnp.float16 else dtype)
    grads = Outputs(dy, operand(batch, entry.length, heads))
    options = {"scale": entry.width**-0.5, "config": PairTiles(**entry.config)}
    suffix = "_full" if full else ""
    forward, backward = (
        functools.partial(f, **options) for f in (squared_forward, squared_backward)
    )
    return [
        Case(f"squared_forward{suffix}", forward, (operands,)),
        Case(f"squared_backward{suffix}", backward, (operands, grads)),
    ]
