"""Backward kernels of the persistent read: weights are computed again from the saved denominators.

With p the weights, c the dropout factors, g the cotangent of one bank's read y and Δ = <g, y>:
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
    kept,
    logits,
    product,
)
from pallas_kernels.persistent_read.launch import PersistentReadConfig, splits


def queries_gradient(
    q: Array,
    keys: Array,
    values: Array,
    scale: Array,
    seed: Array,
    lse: Array,
    grad: Array,
    delta: Array,
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
      q: queries [M H K].
      keys: stored keys [R H P K], of the queries' dtype.
      values: stored values [R H P V].
      scale: factor of the logits [H], float32.
      seed: words of the dropout's seed [2], uint32.
      lse: logarithms to base 2 of the denominators [R H M], float32.
      grad: cotangent of each bank's read, one for all banks [M H V], of the values' dtype.
      delta: Δ [R H M], float32.
      rate: probability of dropping a weight.
      precision: of float32 products; None: three TF32 passes for logits, one for the rest.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      dq [M H K] in the queries' dtype, and <q, dq> / scale of every query [H M], float32, whose sum
      over queries is the gradient of the scale.
    """
    rows, heads, width = q.shape
    banks, _, pairs, value_width = values.shape
    call = Call(rows, heads, pairs, width, value_width, rate, precision, interpret)
    wide, wide_v = power_of_two(width), power_of_two(value_width)
    block = config.backward_rows
    per_row = pl.BlockSpec((banks, None, block), lambda i, h: (0, h, i))
    return launch(
        functools.partial(_queries_kernel, call=call, step=config.backward_pairs),
        name="persistent_read_queries_gradient",
        grid=(-(-rows // block), heads),
        in_specs=[
            pl.BlockSpec((2,), lambda i, h: (0,)),
            pl.BlockSpec((1,), lambda i, h: (h,)),
            pl.BlockSpec((block, None, wide), lambda i, h: (i, h, 0)),
            pl.BlockSpec((banks, None, pairs, wide), lambda i, h: (0, h, 0, 0)),
            pl.BlockSpec((banks, None, pairs, wide_v), lambda i, h: (0, h, 0, 0)),
            per_row,
            pl.BlockSpec((block, None, wide_v), lambda i, h: (i, h, 0)),
            per_row,
        ],
        out_specs=[
            pl.BlockSpec((block, None, wide), lambda i, h: (i, h, 0)),
            pl.BlockSpec((None, block), lambda i, h: (h, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((heads, rows), jnp.float32),
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(seed, scale, q, keys, values, lse, grad, delta)


def _queries_kernel(
    seed_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    lse_ref: Any,
    grad_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    along_ref: Any,
    *,
    call: Call,
    step: int,
) -> None:
    block, wide = q_ref.shape
    first = pl.program_id(0) * block
    head = pl.program_id(1)
    left = call.rows - first
    rows = first + lax.iota(jnp.int32, block)
    q = tile(q_ref, 0, block, left, call.width)
    grad = tile(grad_ref, 0, block, left, call.value_width)
    scale = scale_ref[0]

    def bank(r: Array, acc: Array) -> Array:
        lse = vector(lse_ref, 0, block, left, lead=(r,))
        delta = vector(delta_ref, 0, block, left, lead=(r,))

        def walk(n: Array, acc: Array) -> Array:
            pairs = n * step + lax.iota(jnp.int32, step)
            keys = tile(keys_ref, n * step, step, call.pairs, call.width, lead=(r,))
            values = tile(values_ref, n * step, step, call.pairs, call.value_width, lead=(r,))
            logit = jnp.where((pairs < call.pairs)[None, :], logits(q, keys, scale, call), -jnp.inf)
            weights = softmax_weights(logit, lse[:, None])
            grads = product(grad, values, call, tb=True)
            factor = kept(seed_ref, r * call.heads + head, rows[:, None], pairs[None, :], call)
            if factor is not None:
                grads = grads * factor
            logit_grad = weights * (grads - delta[:, None])
            return acc + product(logit_grad.astype(keys.dtype), keys, call)

        return lax.fori_loop(0, -(-call.pairs // step), walk, acc)

    acc = lax.fori_loop(0, keys_ref.shape[0], bank, jnp.zeros((block, wide), jnp.float32))
    store_tile(dq_ref, acc * scale, first, call.rows, call.width)
    store(along_ref.at[:], jnp.sum(q.astype(jnp.float32) * acc, axis=1), rows < call.rows)


def tables_gradient(
    q: Array,
    keys: Array,
    values: Array,
    scale: Array,
    seed: Array,
    lse: Array,
    grad: Array,
    delta: Array,
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
    rows, heads, width = q.shape
    banks, _, pairs, value_width = values.shape
    call = Call(rows, heads, pairs, width, value_width, rate, precision, interpret)
    wide, wide_v = power_of_two(width), power_of_two(value_width)
    block = config.backward_pairs
    shares = splits(banks * heads, pairs, rows, config)
    per_row = pl.BlockSpec((None, None, rows), lambda j, h, r, s: (r, h, 0))
    key_grads, value_grads = launch(
        functools.partial(_tables_kernel, call=call, step=config.backward_rows, shares=shares),
        name="persistent_read_tables_gradient",
        grid=(-(-pairs // block), heads, banks, shares),
        in_specs=[
            pl.BlockSpec((2,), lambda j, h, r, s: (0,)),
            pl.BlockSpec((1,), lambda j, h, r, s: (h,)),
            pl.BlockSpec((rows, None, wide), lambda j, h, r, s: (0, h, 0)),
            pl.BlockSpec((None, None, block, wide), lambda j, h, r, s: (r, h, j, 0)),
            pl.BlockSpec((None, None, block, wide_v), lambda j, h, r, s: (r, h, j, 0)),
            per_row,
            pl.BlockSpec((rows, None, wide_v), lambda j, h, r, s: (0, h, 0)),
            per_row,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, block, wide), lambda j, h, r, s: (s, r, h, j, 0)),
            pl.BlockSpec((None, None, None, block, wide_v), lambda j, h, r, s: (s, r, h, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((shares, *keys.shape), jnp.float32),
            jax.ShapeDtypeStruct((shares, *values.shape), jnp.float32),
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(seed, scale, q, keys, values, lse, grad, delta)
    return jnp.sum(key_grads, axis=0), jnp.sum(value_grads, axis=0)


def _tables_kernel(
    seed_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    lse_ref: Any,
    grad_ref: Any,
    delta_ref: Any,
    key_grad_ref: Any,
    value_grad_ref: Any,
    *,
    call: Call,
    step: int,
    shares: int,
) -> None:
    block, wide = keys_ref.shape
    first = pl.program_id(0) * block
    table = pl.program_id(2) * call.heads + pl.program_id(1)
    left = call.pairs - first
    pairs = first + lax.iota(jnp.int32, block)
    keys = tile(keys_ref, 0, block, left, call.width)
    values = tile(values_ref, 0, block, left, call.value_width)
    scale = scale_ref[0]
    # A share past the last query reads zeros: q, g and Δ of 0 add nothing.
    tiles = -(-call.rows // step)
    number = -(-tiles // shares)
    begin = pl.program_id(3) * number

    def walk(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_grad, value_grad = carry
        start = (begin + n) * step
        rows = start + lax.iota(jnp.int32, step)
        q = tile(q_ref, start, step, call.rows, call.width)
        grad = tile(grad_ref, start, step, call.rows, call.value_width)
        lse = vector(lse_ref, start, step, call.rows)
        delta = vector(delta_ref, start, step, call.rows)
        logit = jnp.where((pairs < call.pairs)[:, None], logits(keys, q, scale, call), -jnp.inf)
        weights = softmax_weights(logit, lse[None, :])
        grads = product(values, grad, call, tb=True)
        factor = kept(seed_ref, table, rows[None, :], pairs[:, None], call)
        read = weights
        if factor is not None:
            grads, read = grads * factor, weights * factor
        logit_grad = weights * (grads - delta[None, :])
        return (
            key_grad + product(logit_grad.astype(q.dtype), q, call),
            value_grad + product(read.astype(grad.dtype), grad, call),
        )

    zeros = (
        jnp.zeros((block, wide), jnp.float32),
        jnp.zeros((block, values_ref.shape[-1]), jnp.float32),
    )
    key_grad, value_grad = lax.fori_loop(0, number, walk, zeros)
    store_tile(key_grad_ref, key_grad * scale, first, call.pairs, call.width)
    store_tile(value_grad_ref, value_grad, first, call.pairs, call.value_width)
