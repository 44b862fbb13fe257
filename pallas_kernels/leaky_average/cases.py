"""The kernel calls of a table entry, for the lowering test, the compile gate and benchmarks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.leaky_average.backward import leaky_sums_backward
from pallas_kernels.leaky_average.forward import leaky_sums_forward
from pallas_kernels.leaky_average.launch import LeakyAverageConfig
from pallas_kernels.leaky_average.tiles import Clock, GradInputs, Inputs


def cases(entry: Entry) -> list[Case]:
    """Return the calls of both passes, for rows of one document and for packed rows."""
    heads = min(entry.rows, 16)
    batch = max(entry.rows // heads, 1)
    shape = (batch, entry.length, heads, entry.width)
    x = _array(shape, jnp.dtype(entry.dtype))
    rate = _array((heads,), jnp.float32)
    state = _array((batch, heads, entry.width), jnp.float32)
    tokens = _array(shape[:2], jnp.int32)
    clock = Clock(tokens, tokens, _array(shape[:2], jnp.bool_))
    config = LeakyAverageConfig(**entry.config)
    forward = functools.partial(leaky_sums_forward, out_dtype=x.dtype, config=config)
    backward = functools.partial(leaky_sums_backward, x_dtype=x.dtype, config=config)
    return [
        Case("leaky_forward", forward, (Inputs(x, rate, state),)),
        Case("leaky_forward_packed", forward, (Inputs(x, rate, state, clock),)),
        Case("leaky_backward", backward, (GradInputs(x, state, x, rate),)),
        Case("leaky_backward_packed", backward, (GradInputs(x, state, x, rate, clock),)),
    ]


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
