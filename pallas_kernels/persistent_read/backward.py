"""Backward kernels of the persistent read: weights are computed again from the saved denominators.

With p the weights, c the dropout factors, g = dy the cotangent of one bank's read y and Δ = <g, y>:
ds = p (c <g, values> - Δ), dq = scale Σ ds keys, dkeys = scale Σ ds q, dvalues = Σ p c g.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import softmax_weights, store_tile, tile, vector
from pallas_kernels.persistent_read._tiles import (
    Call,
    Operands,
    Saved,
    call_of,
    dropout_mask,
    logits,
    product,
    shared_specs,
)
from pallas_kernels.persistent_read.launch import PersistentReadConfig, splits


def queries_gradient(
    operands: Operands,
    saved: Saved,
    *,
    rate: float,
    precision: Precision | None,
    config: PersistentReadConfig,
    interpret: bool,
) -> tuple[Array, Array]:
    """Return the gradients of the queries and of the scale.

    Grid (M / backward_rows, H); a program owns backward_rows queries of one head and walks over
    the pairs of all banks. Accumulation in float32. Shared memory: `launch.shared_bytes`. FLOPs
    2 M H R P (2 K + V); bytes M H (2 K e_q + V e_v + 8 R) and the tables.

    Args:
      operands: the arrays of the call.
      saved: statistics and cotangents of its queries.
      rate: probability of dropping a weight.
      precision: of float32 products; None: three TF32 passes for logits, one for the rest.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      dq [M H K] in the queries' dtype, and <q, dq> / scale of every query [H M], float32, whose sum
      over queries is the gradient of the scale.
    """
    call = call_of(operands, rate, precision, interpret)
    rows, heads, banks, pairs, *_ = call
    wide, wide_v = power_of_two(call.width), power_of_two(call.value_width)
    block = config.backward_rows
    per_row = pl.BlockSpec((banks, None, block), lambda i, h: (0, h, i))
    return launch(
        functools.partial(_queries_kernel, call=call, step=config.backward_pairs),
        name="persistent_read_queries_gradient",
        grid=(-(-rows // block), heads),
        in_specs=[
            Operands(
                pl.BlockSpec((block, None, wide), lambda i, h: (i, h, 0)),
                pl.BlockSpec((banks, None, pairs, wide), lambda i, h: (0, h, 0, 0)),
                pl.BlockSpec((banks, None, pairs, wide_v), lambda i, h: (0, h, 0, 0)),
                *shared_specs(operands),
            ),
            Saved(per_row, pl.BlockSpec((block, None, wide_v), lambda i, h: (i, h, 0)), per_row),
        ],
        out_specs=[
            pl.BlockSpec((block, None, wide), lambda i, h: (i, h, 0)),
            pl.BlockSpec((None, block), lambda i, h: (h, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((heads, rows), jnp.float32),
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(operands, saved)


def _queries_kernel(
    refs: Operands, saved: Saved, dq_ref: Any, dscale_ref: Any, *, call: Call, step: int
) -> None:
    block, wide = refs.q.shape
    first = pl.program_id(0) * block
    head = pl.program_id(1)
    left = call.rows - first
    rows = first + lax.iota(jnp.int32, block)
    q = tile(refs.q, 0, block, left, call.width)
    dy = tile(saved.dy, 0, block, left, call.value_width)
    scale = refs.scale[0]

    def bank(r: Array, acc: Array) -> Array:
        lse = vector(saved.lse, 0, block, left, lead=(r,))
        delta = vector(saved.delta, 0, block, left, lead=(r,))

        def walk(n: Array, acc: Array) -> Array:
            pairs = n * step + lax.iota(jnp.int32, step)
            keys = tile(refs.keys, n * step, step, call.pairs, call.width, lead=(r,))
            values = tile(refs.values, n * step, step, call.pairs, call.value_width, lead=(r,))
            logit = jnp.where((pairs < call.pairs)[None, :], logits(q, keys, scale, call), -jnp.inf)
            weights = softmax_weights(logit, lse[:, None])
            grads = product(dy, values, call, tb=True)
            factor = dropout_mask(
                refs.seed, r * call.heads + head, rows[:, None], pairs[None, :], call
            )
            if factor is not None:
                grads = grads * factor
            logit_grad = weights * (grads - delta[:, None])
            return acc + product(logit_grad.astype(keys.dtype), keys, call)

        return lax.fori_loop(0, -(-call.pairs // step), walk, acc)

    acc = lax.fori_loop(0, refs.keys.shape[0], bank, jnp.zeros((block, wide), jnp.float32))
    store_tile(dq_ref, acc * scale, first, call.rows, call.width)
    store(dscale_ref.at[:], jnp.sum(q.astype(jnp.float32) * acc, axis=1), rows < call.rows)


def tables_gradient(
    operands: Operands,
    saved: Saved,
    *,
    rate: float,
    precision: Precision | None,
    config: PersistentReadConfig,
    interpret: bool,
) -> tuple[Array, Array]:
    """Return the gradients of the stored keys and values, float32 [R H P K] and [R H P V].

    Grid (P / backward_pairs, H, R, S); a program owns backward_pairs pairs of one table and walks
    over one of S shares of the queries; shares are added afterwards. Accumulation in float32.
    Shared memory: `launch.shared_bytes`. FLOPs 2 M H R P (2 K + 2 V); bytes: the tables, their
    gradients 4 S R H P (K + V), and the queries' side, shared through the cache.

    Arguments as in `queries_gradient`.
    """
    call = call_of(operands, rate, precision, interpret)
    rows, heads, banks, pairs, *_ = call
    wide, wide_v = power_of_two(call.width), power_of_two(call.value_width)
    block = config.backward_pairs
    shares = splits(banks * heads, pairs, rows, config)
    per_row = pl.BlockSpec((None, None, rows), lambda j, h, r, s: (r, h, 0))
    dkeys, dvalues = launch(
        functools.partial(_tables_kernel, call=call, step=config.backward_rows, shares=shares),
        name="persistent_read_tables_gradient",
        grid=(-(-pairs // block), heads, banks, shares),
        in_specs=[
            Operands(
                pl.BlockSpec((rows, None, wide), lambda j, h, r, s: (0, h, 0)),
                pl.BlockSpec((None, None, block, wide), lambda j, h, r, s: (r, h, j, 0)),
                pl.BlockSpec((None, None, block, wide_v), lambda j, h, r, s: (r, h, j, 0)),
                *shared_specs(operands),
            ),
            Saved(
                per_row, pl.BlockSpec((rows, None, wide_v), lambda j, h, r, s: (0, h, 0)), per_row
            ),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, block, wide), lambda j, h, r, s: (s, r, h, j, 0)),
            pl.BlockSpec((None, None, None, block, wide_v), lambda j, h, r, s: (s, r, h, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((shares, *operands.keys.shape), jnp.float32),
            jax.ShapeDtypeStruct((shares, *operands.values.shape), jnp.float32),
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(operands, saved)
    return jnp.sum(dkeys, axis=0), jnp.sum(dvalues, axis=0)


def _tables_kernel(
    refs: Operands,
    saved: Saved,
    dkeys_ref: Any,
    dvalues_ref: Any,
    *,
    call: Call,
    step: int,
    shares: int,
) -> None:
    block, wide = refs.keys.shape
    first = pl.program_id(0) * block
    table = pl.program_id(2) * call.heads + pl.program_id(1)
    left = call.pairs - first
    pairs = first + lax.iota(jnp.int32, block)
    keys = tile(refs.keys, 0, block, left, call.width)
    values = tile(refs.values, 0, block, left, call.value_width)
    scale = refs.scale[0]
    # A share past the last query reads zeros: q, g and Δ of 0 add nothing.
    tiles = -(-call.rows // step)
    number = -(-tiles // shares)
    begin = pl.program_id(3) * number

    def walk(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dkeys, dvalues = carry
        start = (begin + n) * step
        rows = start + lax.iota(jnp.int32, step)
        q = tile(refs.q, start, step, call.rows, call.width)
        dy = tile(saved.dy, start, step, call.rows, call.value_width)
        lse = vector(saved.lse, start, step, call.rows)
        delta = vector(saved.delta, start, step, call.rows)
        logit = jnp.where((pairs < call.pairs)[:, None], logits(keys, q, scale, call), -jnp.inf)
        weights = softmax_weights(logit, lse[None, :])
        grads = product(values, dy, call, tb=True)
        factor = dropout_mask(refs.seed, table, rows[None, :], pairs[:, None], call)
        read = weights
        if factor is not None:
            grads, read = grads * factor, weights * factor
        logit_grad = weights * (grads - delta[None, :])
        return (
            dkeys + product(logit_grad.astype(q.dtype), q, call),
            dvalues + product(read.astype(dy.dtype), dy, call),
        )

    zeros = (
        jnp.zeros((block, wide), jnp.float32),
        jnp.zeros((block, refs.values.shape[-1]), jnp.float32),
    )
    dkeys, dvalues = lax.fori_loop(0, number, walk, zeros)
    store_tile(dkeys_ref, dkeys * scale, first, call.pairs, call.width)
    store_tile(dvalues_ref, dvalues, first, call.pairs, call.value_width)
