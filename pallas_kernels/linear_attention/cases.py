"""The kernel calls of a table entry, for the lowering test, the compile gate and benchmarks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.linear_attention.backward import linear_backward
from pallas_kernels.linear_attention.forward import linear_forward
from pallas_kernels.linear_attention.launch import LinearAttentionConfig, Operands, Outputs


def cases(entry: Entry) -> list[Case]:
    """Return the calls of both passes, with gates alone and with all that they can do.

    The latter has documents, totals, and two heads for each query and key.
    """
    return _cases(entry, "") + _cases(entry, "_full")


def _cases(entry: Entry, suffix: str) -> list[Case]:
    full = bool(suffix)
    heads = min(max(entry.rows, 2), 16)
    batch, length, width = max(entry.rows // heads, 1), entry.length, entry.width
    dtype = jnp.dtype(entry.dtype)

    def operand(*shape: int, of: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(of))

    queries = operand(batch, length, heads // 2 if full else heads, width, of=dtype)
    values = operand(batch, length, heads, width, of=dtype)
    memory = operand(batch, heads, width, width)
    key_sum = operand(batch, heads, width) if full else None
    operands = Operands(
        queries,
        queries,
        values,
        operand(batch, length, heads),
        operand(batch, length, of=jnp.int32) if full else None,
        memory,
        key_sum,
    )
    grads = Outputs(values, operand(batch, length, heads) if full else None, memory, key_sum)
    options = {"scale": width**-0.5, "config": LinearAttentionConfig(**entry.config)}
    return [
        Case(f"linear_forward{suffix}", functools.partial(linear_forward, **options), (operands,)),
        Case(
            f"linear_backward{suffix}",
            functools.partial(linear_backward, **options),
            (operands, grads),
        ),
    ]
