"""Backward kernel of the leaky average."""

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
    COUNTED,
    REAL,
    GradInputs,
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


def leaky_sums_backward(
    inputs: GradInputs,
    *,
    x_dtype: DTypeLike,
    config: LeakyAverageConfig | None = None,
    precision: Precision = "high",
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Run s_t = g_t + a_{t+1} s_{t+1} backwards; dx = s, drate = -Σ a_t <s_t, h_{t-1}>.

    a_t is λ = exp(-rate) for a token that continues its document, 1 at padding and 0 at a reset;
    only the first kind counts for the rate. A chunk gives R_t = a_{t+1} s_{t+1} as a strictly
    triangular product, so that R_t h_t loses nothing to cancellation where rates are large.

    Grid, split of time, tiles, shared memory and accumulation as in the forward kernel, mirrored in
    time. Each program writes its own part of Σ R h [B, splits, H, K], and XLA adds the parts: no
    program waits for another, and the result is the same in every run. 2 B T H K C FLOPs;
    (2 e_out + e_in) B T H K bytes, and e_out B T H K more with several splits. Not measured on a
    device yet.

    Args:
      inputs: operands.
      x_dtype: dtype of the inputs, which their cotangent gets.
      config: launch configuration; None takes that of the tables.
      precision: of the products of decays and cotangents (see `product`).
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      The cotangent of x; Σ_{t>1} a_t <s_t, h_{t-1}> [H] over the tokens that decay, to which the
      first token adds <dstart, start>; dstart, the cotangent of the state before the first token.
    """
    g, dfinal, sums, rate, clock = inputs
    batch, length, heads, width = g.shape
    config = config or find_config(x_dtype, g.shape)
    grid = layout(config, g.shape)
    clocks = as_operands(clock)
    where = specs(grid, length, packed=bool(clocks))
    carry_grads: tuple[Array, ...] = ()
    if grid.splits > 1:
        carry_grads = (
            split_sums(g, rate, clocks, grid, config, reverse=True, interpret=interpret),
        )
    kernel = functools.partial(
        _kernel,
        length=length,
        width=width,
        layout=grid,
        chunk=config.chunk,
        precision=precision,
        interpret=interpret,
    )
    per_split = jax.ShapeDtypeStruct((batch, grid.splits, heads, width), jnp.float32)
    dx, carried, products = launch(
        kernel,
        name=f"leaky_backward{'_packed' if clocks else ''}",
        grid=(grid.blocks, heads, grid.splits, batch),
        in_specs=[
            where["tokens"],
            where["tokens"],
            where["rate"],
            where["state"],
            *([where["splits"]] * len(carry_grads)),
            *where["clock"],
        ],
        out_specs=[where["tokens"], where["split"], where["split"]],
        out_shape=[jax.ShapeDtypeStruct(g.shape, jnp.dtype(x_dtype)), per_split, per_split],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(g, sums, rate, dfinal, *carry_grads, *clocks)
    return dx, jnp.sum(products, axis=(0, 1, 3)), carried[:, 0]


def _kernel(
    g_ref: Any,
    sums_ref: Any,
    rate_ref: Any,
    final_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    chunk: int,
    precision: Precision,
    interpret: bool,
) -> None:
    *optional, dx_ref, carried_ref, products_ref = refs
    grads_ref = optional.pop(0) if layout.splits > 1 else None
    times = Times(length, tuple(optional))
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(2) * layout.span
    log2_decay = -LOG2_E * load(rate_ref)
    steps = jnp.arange(chunk)
    upper = steps[:, None] < steps[None, :]
    number = layout.span // chunk

    def decays(now: tuple) -> Array:
        return jnp.where(upper, decay_between(log2_decay, row(now), column(now)), 0.0)

    always = None if times.refs else decays((steps, jnp.zeros_like(steps)))

    def step(n: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        carry, products = carried
        at = first + (number - 1 - n) * chunk
        rows = at + steps
        tile = pl.ds(at, chunk)
        now, last = times.at(rows), times.at(at + chunk - 1)
        matrix = decays(now) if always is None else always
        inside = (rows < length)[:, None] & columns[None, :]
        g = load_tokens(g_ref, at, rows, times, columns)
        after = product(matrix, g, precision=precision, interpret=interpret)
        after += decay_between(log2_decay, last, now)[:, None] * carry[None, :]
        adjoint = g.astype(jnp.float32) + after
        real = times.flag(rows, REAL)[:, None]
        store(dx_ref.at[tile, :], jnp.where(real, adjoint, 0.0), inside)
        h = load(sums_ref.at[tile, :], inside).astype(jnp.float32)
        counted = times.flag(rows, COUNTED)[:, None]
        products += jnp.sum(jnp.where(counted, after * h, 0.0), axis=0)
        entering = decay_between(log2_decay, times.at(at), times.at(at - 1))
        carry = jnp.where(at < length, entering * pick(adjoint, rows == at), carry)
        return carry, products

    carry = load(final_ref, columns)
    if grads_ref is not None:
        carry = _incoming(grads_ref, carry, times, log2_decay, columns, layout)
    carry, products = jax.lax.fori_loop(0, number, step, (carry, jnp.zeros_like(carry)))
    store(carried_ref, carry, columns)
    store(products_ref, products, columns)


def _incoming(
    grads_ref: Any,
    final: Array,
    times: Times,
    log2_decay: Array,
    columns: Array,
    layout: Layout,
) -> Array:
    """Add up what the splits after this one, and the final state, hand to its last token."""
    split = pl.program_id(2)
    order = jnp.arange(layout.ends)
    now = times.at((split + 1) * layout.span - 1)
    weights = decay_between(log2_decay, times.at(order * layout.span - 1), now)
    later = (order > split) & (order < layout.splits)
    carry_grads = load(grads_ref, later[:, None] & columns[None, :])
    end = decay_between(log2_decay, times.at(times.length - 1), now)
    return end * final + jnp.sum(jnp.where(later, weights, 0.0)[:, None] * carry_grads, axis=0)
