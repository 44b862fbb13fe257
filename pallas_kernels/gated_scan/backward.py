"""Backward kernel of the gated scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels._compat import launch, load, pl, store
from pallas_kernels.gated_scan.launch import GatedScanConfig, Layout, find_config, layout
from pallas_kernels.gated_scan.steps import (
    DECAY,
    GradInputs,
    Tokens,
    incoming,
    silent,
    specs,
    split_sums,
)


def gated_scan_backward(
    inputs: GradInputs,
    *,
    x_dtype: DTypeLike,
    config: GatedScanConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Run s_t = g_t + a_{t+1} s_{t+1} backwards; dx = s, dlog_decay_t = a_t s_t h_{t-1}.

    Grid, split of time, row blocks and carry as in the forward kernel, mirrored in time. Nothing is
    summed over programs. 5 B T D FLOPs; (3 e_x + 2 e_a) B T D bytes, and (e_x + e_a) B T D more
    with several splits. Not measured on a device yet.

    Args:
      inputs: operands.
      x_dtype: dtype of the inputs, which their cotangent gets.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      The cotangents of x, log_decay and start.
    """
    g, dfinal, h, log_decay, start, kinds = inputs
    batch, length, width = g.shape
    config = config or find_config(x_dtype, g.shape)
    grid = layout(config, g.shape)
    where = specs(grid, length)
    kind = () if kinds is None else (kinds,)
    parts: tuple[Array, ...] = ()
    if grid.splits > 1:
        parts = split_sums(g, log_decay, kind, grid, config, reverse=True, interpret=interpret)
    kernel = functools.partial(_kernel, length=length, width=width, layout=grid, rows=config.rows)
    tokens, state = where["tokens"], where["state"]
    dx, dlog_decay, carried = launch(
        kernel,
        name=f"gated_backward{'_packed' if kind else ''}",
        grid=(grid.blocks, grid.splits, batch),
        in_specs=[
            tokens,
            state,
            tokens,
            tokens,
            state,
            *([where["splits"]] * len(parts)),
            *([where["kinds"]] * len(kind)),
        ],
        out_specs=[tokens, tokens, where["split"]],
        out_shape=[
            jax.ShapeDtypeStruct(g.shape, jnp.dtype(x_dtype)),
            jax.ShapeDtypeStruct(g.shape, log_decay.dtype),
            jax.ShapeDtypeStruct((batch, grid.splits, width), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(g, dfinal, h, log_decay, start, *parts, *kind)
    return dx, dlog_decay, carried[:, 0]


def _kernel(
    g_ref: Any,
    final_ref: Any,
    h_ref: Any,
    log_decay_ref: Any,
    start_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    rows: int,
) -> None:
    *optional, dx_ref, dlog_decay_ref, carried_ref = refs
    parts = [optional.pop(0) for _ in range(2 if layout.splits > 1 else 0)]
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(1) * layout.span
    tokens = Tokens(length, columns, log_decay_ref, optional[0] if optional else None)
    start = load(start_ref, columns)
    number = layout.span // rows

    def block(n: Array, carry: Array) -> Array:
        at = first + (number - 1 - n) * rows
        loaded = []
        for t in (at + i for i in reversed(range(rows))):
            kind = tokens.kind(t)
            before = tokens.load(h_ref, jnp.maximum(t - 1, 0))
            before = jnp.where(t == 0, start, before)
            g = silent(tokens.load(g_ref, t), kind)
            loaded.append((t, kind, g, tokens.gate(t, kind), before))
        for t, kind, g, a, before in loaded:
            s = g + carry
            carry = a * s
            tokens.store(dx_ref, t, silent(s, kind))
            by_gate = carry * before
            if kind is not None:
                by_gate = jnp.where(kind == DECAY, by_gate, 0.0)
            tokens.store(dlog_decay_ref, t, by_gate)
        return carry

    carry = load(final_ref, columns)
    if parts:
        carry = incoming(parts[0], parts[1], carry, columns, layout.splits, reverse=True)
    store(carried_ref, jax.lax.fori_loop(0, number, block, carry), columns)
