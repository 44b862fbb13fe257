"""The kernel calls of a table entry, for the lowering test, the compile gate and benchmarks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._launch import Case, Entry
from pallas_kernels.leaky_average.backward import leaky_sums_backward
from pallas_kernels.leaky_average.forward import leaky_sums_forward
from pallas_kernels.leaky_average.launch import LeakyAverageConfig
from pallas_kernels.leaky_average.tiles import Clock


def cases(entry: Entry) -> list[Case]:
    """Return the calls of both passes, for rows of one document and for packed rows."""
    heads = min(entry.rows, 16)
    batch = max(entry.rows // heads, 1)
    shape = (batch, entry.length, heads, entry.width)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(entry.dtype))
    rate = jax.ShapeDtypeStruct((heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, entry.width), jnp.float32)
    tokens = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    clock = (tokens, tokens, jax.ShapeDtypeStruct(shape[:2], jnp.bool_))
    config = LeakyAverageConfig(**entry.config)
    forward = functools.partial(leaky_sums_forward, out_dtype=x.dtype, config=config)
    backward = functools.partial(leaky_sums_backward, x_dtype=x.dtype, config=config)
    return [
        Case("leaky_forward", forward, (x, rate, state)),
        Case("leaky_forward_packed", functools.partial(_packed, forward), (x, rate, state, *clock)),
        Case("leaky_backward", backward, (x, state, x, rate)),
        Case(
            "leaky_backward_packed",
            functools.partial(_packed, backward),
            (x, state, x, rate, *clock),
        ),
    ]


def _packed(kernel: Callable, *operands: Array) -> tuple[Array, ...]:
    """Call a kernel whose last three operands make up a clock."""
    return kernel(*operands[:-3], Clock(*operands[-3:]))
