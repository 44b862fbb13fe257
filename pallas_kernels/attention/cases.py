"""The kernels of attention at the shapes of a table's entries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.attention._tiles import Operands, Rule, Saved
from pallas_kernels.attention.backward import keys_gradient, queries_gradient
from pallas_kernels.attention.forward import forward
from pallas_kernels.pairs import Decay, PairTiles, Places

KERNELS = {
    "attention_forward": forward,
    "attention_queries_gradient": queries_gradient,
    "attention_keys_gradient": keys_gradient,
}


def cases(entry: Entry) -> list[Case]:
    """Return the three kernels launched as the entry says, plain and with all that they can do.

    The latter also reads values of half precision with float32 keys, as the contextual memory does.
    Where a query sees its own place, the gradients of gates leave it out, so the backward kernels
    come a third time, with what 2Mamba asks of them.
    """
    return _cases(entry, "") + _cases(entry, "_full") + _cases(entry, "_forget")[1:]


def _cases(entry: Entry, suffix: str) -> list[Case]:
    full, gated = suffix == "_full", suffix != ""
    batch, length, heads = 2, entry.length, max(entry.rows // 2, 2)
    groups = heads // 2 if full else heads
    wide = jnp.dtype(jnp.float32)
    dtype = jnp.dtype(entry.dtype)
    value_dtype = jnp.dtype(jnp.bfloat16) if full and dtype == wide else dtype

    def operand(*shape: int, of: Any = wide) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    tokens, sums = operand(batch, length, of=jnp.dtype(jnp.int32)), operand(batch, heads, length)
    operands = Operands(
        operand(batch, length, heads, entry.width, of=dtype),
        operand(batch, length, groups, entry.width, of=dtype),
        operand(batch, length, groups, entry.width, of=value_dtype),
        operand(heads),
        Places(tokens, tokens, tokens, tokens) if gated else None,
        Decay(sums, sums, sums, sums) if gated else None,
        sums if full else None,
        operand(2, of=jnp.dtype(jnp.uint32)) if full else None,
    )
    dy = operand(batch, length, heads, entry.width, of=value_dtype)
    saved = Saved(sums, dy, sums)
    rule = Rule(lag=1, window=length // 2, rate=0.1, clamp=5.0) if full else Rule()
    options = {"rule": rule, "config": PairTiles(**entry.config), "interpret": False}
    return [
        Case(
            name + suffix,
            functools.partial(kernel, **options),
            (operands,) if kernel is forward else (operands, saved),
        )
        for name, kernel in KERNELS.items()
    ]
