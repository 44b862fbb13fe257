"""Forward kernel of attention: a running softmax over tiles of keys (FlashAttention-2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import launch, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import inside, softmax_weights, store_tile, tile
from pallas_kernels.attention._tiles import (
    Bounds,
    Call,
    Operands,
    Rule,
    block_bounds,
    by_head,
    call_of,
    decayed,
    dropout_mask,
    gates_of,
    input_specs,
    key_blocks,
    keys_of,
    logits,
    product,
    queries_of,
    visible,
    walk,
)
from pallas_kernels.pairs import PairTiles


def forward(
    operands: Operands, rule: Rule, *, config: PairTiles, interpret: bool
) -> tuple[Array, Array]:
    """Average values: y_i = Σ_j softmax_j(min(scale q_i·k_j, clamp) + F_i - F_j) gate_j v_j.

    Grid (T / block_q, H, B), the last rows, which see most, first; a program owns block_q queries
    of one head and walks over the key blocks that these may see: first those that a window cuts,
    then whole ones without a mask, then those on the diagonal. Accumulation, maximum and sum in
    float32.
    Shared memory: `launch.shared_bytes`. FLOPs 2 (K + V) per visible pair; bytes of q, k, v and y,
    with k and v read once per query block, mostly from the cache.

    Args:
      operands: the arrays of the call.
      rule: which keys are visible, and what else is static.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      y [B T H V] in the dtype of the values, 0 where nothing is visible, and the logarithm to base
      2 of the softmax's denominator [B H T], float32, -inf there.
    """
    batch, queries, heads, _ = operands.q.shape
    call = call_of(operands, rule, (config.block_q, config.block_k), interpret)
    places, v = operands.places, operands.v
    bounds = None if places is None else block_bounds(call, places, axis=2)
    spec, blocks = functools.partial(by_head, call), -(-queries // call.block_q)
    block_y = (None, call.block_q, None, power_of_two(call.value_width))
    return launch(
        functools.partial(_kernel, call=call),
        name="attention_forward",
        grid=(blocks, heads, batch),
        in_specs=[
            input_specs(spec, operands),
            jax.tree.map(lambda a: spec(a, "bt"), bounds),
        ],
        out_specs=[
            pl.BlockSpec(block_y, lambda i, h, b: (b, blocks - 1 - i, h, 0)),
            pl.BlockSpec((None, None, call.block_q), lambda i, h, b: (b, h, blocks - 1 - i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads, call.value_width), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(operands, bounds)


def _kernel(refs: Operands, bounds: Bounds | None, y_ref: Any, lse_ref: Any, *, call: Call) -> None:
    number, head, row = (pl.program_id(axis) for axis in range(3))
    block = pl.num_programs(0) - 1 - number
    start = block * call.block_q
    scale = refs.scale[head]
    q = tile(refs.q, start, call.block_q, call.queries, call.width)
    queries = queries_of(call, start, refs.places, axis=0)

    def visit(n: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple:
        row_max, total, acc = carry
        at = n * call.block_k
        k = tile(refs.k, at, call.block_k, call.keys, call.width)
        v = tile(refs.v, at, call.block_k, call.keys, call.value_width)
        keys = keys_of(call, at, refs.places, axis=1)
        logit = logits(call, q, k, scale).value
        logit = decayed(call, refs.decay, logit, (), start, at, axis=0)
        if masked:
            logit = jnp.where(visible(call, queries, keys), logit, -jnp.inf)
        new_max = jnp.maximum(row_max, jnp.max(logit, axis=1))
        # Where nothing was visible so far, exp2(-inf - 0) is 0 and exp2(-inf + inf) would be NaN.
        base = jnp.where(new_max == -jnp.inf, 0.0, new_max)
        alpha = jnp.exp2(row_max - base)
        weights = softmax_weights(logit, base[:, None])
        total = total * alpha + jnp.sum(weights, axis=1)
        factor = dropout_mask(call, refs.seed, row, head, queries, keys)
        gate = gates_of(call, refs.gate, at, (), axis=1)
        read = weights if factor is None else weights * factor
        read = (read if gate is None else read * gate).astype(v.dtype)
        return new_max, total, acc * alpha[:, None] + product(call, read, v)

    carry = (
        jnp.full((call.block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((call.block_q,), jnp.float32),
        jnp.zeros((call.block_q, y_ref.shape[-1]), jnp.float32),
    )
    row_max, total, acc = walk(key_blocks(call, block, bounds), visit, carry)
    safe = jnp.where(total < 0.5, 1.0, total)
    store_tile(y_ref, acc / safe[:, None], start, call.queries, call.value_width)
    lse = row_max + jnp.log2(safe)
    store(lse_ref.at[:], lse, inside(start, call.block_q, call.queries))
