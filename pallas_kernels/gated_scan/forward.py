"""Forward kernel of the gated scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import launch, load, pl, store
from pallas_kernels.gated_scan.launch import GatedScanConfig, Layout, find_config, layout
from pallas_kernels.gated_scan.steps import Inputs, Tokens, incoming, silent, specs, split_sums


def gated_scan_forward(
    inputs: Inputs,
    *,
    config: GatedScanConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Run h_t = exp(log_decay_t) h_{t-1} + x_t over [B, T, D].

    Grid (channel blocks, splits of time, batch). A program owns P channels over its span of time
    and walks it token by token, R at a time: it loads all R rows, then takes the R steps that
    depend on each other. With more than one split a first kernel (`gated_ends`) runs each split
    from zero, and every program leads the initial state through the splits before its own.

    No shared memory, no products of matrices; carried in float32. Saved for the backward pass: h.
    3 B T D FLOPs and as many exponentials as inputs; (2 e_x + e_a) B T D bytes at e bytes a number,
    and (e_x + e_a) B T D more with several splits. Not measured on a device yet.

    Args:
      inputs: operands.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      h [B, T, D] in the dtype of x, standing still at padding, and the last h in float32 [B, D].
    """
    x, log_decay, start, kinds = inputs
    batch, length, width = x.shape
    config = config or find_config(x.dtype, x.shape)
    grid = layout(config, x.shape)
    where = specs(grid, length)
    kind = () if kinds is None else (kinds,)
    parts: tuple[Array, ...] = ()
    if grid.splits > 1:
        parts = split_sums(x, log_decay, kind, grid, config, reverse=False, interpret=interpret)
    kernel = functools.partial(_kernel, length=length, width=width, layout=grid, rows=config.rows)
    h, final = launch(
        kernel,
        name=f"gated_forward{'_packed' if kind else ''}",
        grid=(grid.blocks, grid.splits, batch),
        in_specs=[
            where["tokens"],
            where["tokens"],
            where["state"],
            *([where["splits"]] * len(parts)),
            *([where["kinds"]] * len(kind)),
        ],
        out_specs=[where["tokens"], where["split"]],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, grid.splits, width), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, log_decay, start, *parts, *kind)
    return h, final[:, -1]


def _kernel(
    x_ref: Any,
    log_decay_ref: Any,
    start_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    rows: int,
) -> None:
    *optional, h_ref, final_ref = refs
    parts = [optional.pop(0) for _ in range(2 if layout.splits > 1 else 0)]
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(1) * layout.span
    tokens = Tokens(length, columns, log_decay_ref, optional[0] if optional else None)

    def block(n: Array, h: Array) -> Array:
        at = first + n * rows
        loaded = []
        for t in (at + i for i in range(rows)):
            kind = tokens.kind(t)
            loaded.append((tokens.gate(t, kind), silent(tokens.load(x_ref, t), kind)))
        for i, (a, x) in enumerate(loaded):
            h = a * h + x
            tokens.store(h_ref, at + i, h)
        return h

    h = load(start_ref, columns)
    if parts:
        h = incoming(parts[0], parts[1], h, columns, layout.splits, reverse=False)
    store(final_ref, jax.lax.fori_loop(0, layout.span // rows, block, h), columns)
