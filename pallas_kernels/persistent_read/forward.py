"""Forward kernel of the persistent read: one pass over the stored pairs, no weights in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import softmax_weights, store_tile, tile
from pallas_kernels.persistent_read._tiles import (
    Call,
    Operands,
    call_of,
    dropout_mask,
    logits,
    product,
    shared_specs,
)
from pallas_kernels.persistent_read.launch import PersistentReadConfig


def forward(
    operands: Operands,
    *,
    rate: float,
    precision: Precision | None,
    config: PersistentReadConfig,
    interpret: bool,
) -> tuple[Array, Array]:
    """Read every bank: y_r = Σ_p w_rp values_rp with w_r = softmax_p(scale q·keys_rp).

    Grid (M / block_rows, H, R); a program owns block_rows queries of one head and one bank, and
    walks over the pairs with a running maximum and sum. Accumulation in float32. Shared memory:
    `launch.shared_bytes`. FLOPs 2 M H R P (K + V); bytes M H R (K e_q + 4 V + 4), and the
    tables R H P (K e_q + V e_v), which all programs of a head share through the cache.

    Args:
      operands: the arrays of the call.
      rate: probability of dropping a weight.
      precision: of float32 products; None: three TF32 passes for logits, one for values.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      Reads [R M H V], float32, and the logarithm to base 2 of each softmax's denominator [R H M],
      float32, by which the backward kernels know the weights.
    """
    call = call_of(operands, rate, precision, interpret)
    rows, heads, banks, pairs, *_ = call
    wide, wide_v = power_of_two(call.width), power_of_two(call.value_width)
    block = config.block_rows
    return launch(
        functools.partial(_kernel, call=call, step=config.block_pairs),
        name="persistent_read_forward",
        grid=(-(-rows // block), heads, banks),
        in_specs=[
            Operands(
                pl.BlockSpec((block, None, wide), lambda i, h, r: (i, h, 0)),
                pl.BlockSpec((None, None, pairs, wide), lambda i, h, r: (r, h, 0, 0)),
                pl.BlockSpec((None, None, pairs, wide_v), lambda i, h, r: (r, h, 0, 0)),
                *shared_specs(operands),
            )
        ],
        out_specs=[
            pl.BlockSpec((None, block, None, wide_v), lambda i, h, r: (r, i, h, 0)),
            pl.BlockSpec((None, None, block), lambda i, h, r: (r, h, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((banks, rows, heads, call.value_width), jnp.float32),
            jax.ShapeDtypeStruct((banks, heads, rows), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(operands)


def _kernel(refs: Operands, y_ref: Any, lse_ref: Any, *, call: Call, step: int) -> None:
    block, wide_v = refs.q.shape[0], refs.values.shape[-1]
    first = pl.program_id(0) * block
    table = pl.program_id(2) * call.heads + pl.program_id(1)
    rows = first + lax.iota(jnp.int32, block)
    # The block's own rows: masked against those that the call has left.
    q = tile(refs.q, 0, block, call.rows - first, call.width)
    scale = refs.scale[0]

    def walk(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row_max, total, acc = carry
        pairs = n * step + lax.iota(jnp.int32, step)
        keys = tile(refs.keys, n * step, step, call.pairs, call.width)
        values = tile(refs.values, n * step, step, call.pairs, call.value_width)
        logit = jnp.where((pairs < call.pairs)[None, :], logits(q, keys, scale, call), -jnp.inf)
        # Every step holds a pair, so the new maximum is finite.
        new_max = jnp.maximum(row_max, jnp.max(logit, axis=1))
        alpha = jnp.exp2(row_max - new_max)
        weights = softmax_weights(logit, new_max[:, None])
        total = total * alpha + jnp.sum(weights, axis=1)
        factor = dropout_mask(refs.seed, table, rows[:, None], pairs[None, :], call)
        read = (weights if factor is None else weights * factor).astype(values.dtype)
        return new_max, total, acc * alpha[:, None] + product(read, values, call)

    start = (
        jnp.full((block,), -jnp.inf, jnp.float32),
        jnp.zeros((block,), jnp.float32),
        jnp.zeros((block, wide_v), jnp.float32),
    )
    row_max, total, acc = lax.fori_loop(0, -(-call.pairs // step), walk, start)
    total = jnp.where(total < 0.5, 1.0, total)
    store_tile(y_ref, acc / total[:, None], first, call.rows, call.value_width)
    store(lse_ref.at[:], row_max + jnp.log2(total), rows < call.rows)
