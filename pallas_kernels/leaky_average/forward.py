"""Forward kernel of the leaky average."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels._compat import Precision, launch, load, pl, store
from pallas_kernels._tiles import LOG2_E
from pallas_kernels.leaky_average.launch import Layout, LeakyAverageConfig, find_config, layout
from pallas_kernels.leaky_average.tiles import (
    Inputs,
    Times,
    as_operands,
    column,
    decay_between,
    load_tokens,
    pick,
    product,
    row,
    specs,
    split_sums,
)


def leaky_sums_forward(
    inputs: Inputs,
    *,
    out_dtype: DTypeLike,
    config: LeakyAverageConfig | None = None,
    precision: Precision = "high",
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Run h_t = exp(-rate) h_{t-1} + x_t over [B, T, H, K].

    Grid (channel blocks, heads, splits of time, batch). A program owns P channels of one head over
    its span of time and walks it in chunks of C tokens: Y = M X + λ^(1..C) ⊗ h, with the triangular
    matrix M_ij = λ^(i-j) of decays and h the last row of the chunk before. With more than one split
    a first kernel (`leaky_ends`) sums each split from zero, and every program adds up the splits
    before its own by itself.

    Shared memory: e (C² + P C stages) bytes at most, e bytes a number. Accumulated and carried in
    float32. Saved for the backward pass: the sums. 2 B T H K C FLOPs; (e_in + e_out) B T H K bytes,
    and once more e_in B T H K with several splits. Not measured on a device yet.

    Args:
      inputs: operands.
      out_dtype: dtype of the sums.
      config: launch configuration; None takes that of the tables.
      precision: of the products of decays and inputs (see `product`).
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      The sums [B, T, H, K], standing still at padding, and the last of them in float32 [B, H, K].
    """
    x, rate, start, clock = inputs
    batch, length, heads, width = x.shape
    config = config or find_config(x.dtype, x.shape)
    grid = layout(config, x.shape)
    clocks = as_operands(clock)
    where = specs(grid, length, packed=bool(clocks))
    ends: tuple[Array, ...] = ()
    if grid.splits > 1:
        ends = (split_sums(x, rate, clocks, grid, config, reverse=False, interpret=interpret),)
    kernel = functools.partial(
        _kernel,
        length=length,
        width=width,
        layout=grid,
        chunk=config.chunk,
        precision=precision,
        interpret=interpret,
    )
    sums, final = launch(
        kernel,
        name=f"leaky_forward{'_packed' if clocks else ''}",
        grid=(grid.blocks, heads, grid.splits, batch),
        in_specs=[
            where["tokens"],
            where["rate"],
            where["state"],
            *([where["splits"]] * len(ends)),
            *where["clock"],
        ],
        out_specs=[where["tokens"], where["split"]],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, jnp.dtype(out_dtype)),
            jax.ShapeDtypeStruct((batch, grid.splits, heads, width), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, rate, start, *ends, *clocks)
    return sums, final[:, -1]


def _kernel(
    x_ref: Any,
    rate_ref: Any,
    start_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    chunk: int,
    precision: Precision,
    interpret: bool,
) -> None:
    *optional, y_ref, final_ref = refs
    ends_ref = optional.pop(0) if layout.splits > 1 else None
    times = Times(length, tuple(optional))
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(2) * layout.span
    log2_decay = -LOG2_E * load(rate_ref)
    steps = jnp.arange(chunk)
    lower = steps[:, None] >= steps[None, :]

    def decays(now: tuple, before: tuple) -> tuple[Array, Array]:
        matrix = decay_between(log2_decay, column(now), row(now))
        return jnp.where(lower, matrix, 0.0), decay_between(log2_decay, now, before)

    same = jnp.zeros_like(steps)
    always = None if times.refs else decays((steps + 1, same), (0, 0))

    def step(n: Array, carry: Array) -> Array:
        at = first + n * chunk
        rows = at + steps
        matrix, entering = always or decays(times.at(rows), times.at(at - 1))
        x = load_tokens(x_ref, at, rows, times, columns)
        y = product(matrix, x, precision=precision, interpret=interpret)
        y += entering[:, None] * carry[None, :]
        store(y_ref.at[pl.ds(at, chunk), :], y, (rows < length)[:, None] & columns[None, :])
        # The last split may end within a chunk, or before the one at hand.
        last = pick(y, rows == jnp.minimum(at + chunk, length) - 1)
        return jnp.where(at < length, last, carry)

    carry = load(start_ref, columns)
    if ends_ref is not None:
        carry = _incoming(ends_ref, carry, times, log2_decay, columns, layout)
    store(final_ref, jax.lax.fori_loop(0, layout.span // chunk, step, carry), columns)


def _incoming(
    ends_ref: Any, start: Array, times: Times, log2_decay: Array, columns: Array, layout: Layout
) -> Array:
    """Add up what the splits before this one, and the initial state, leave at its beginning."""
    split = pl.program_id(2)
    order = jnp.arange(layout.ends)
    now = times.at(split * layout.span - 1)
    weights = decay_between(log2_decay, now, times.at((order + 1) * layout.span - 1))
    earlier = order < split
    ends = load(ends_ref, earlier[:, None] & columns[None, :])
    before = decay_between(log2_decay, now, (0, 0))
    return before * start + jnp.sum(jnp.where(earlier, weights, 0.0)[:, None] * ends, axis=0)
