"""Forward kernel of attention: a running softmax over tiles of keys (FlashAttention-2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import inside, softmax_weights, store_tile, tile
from pallas_kernels.attention._tiles import (
    Bounds,
    Call,
    block_bounds,
    by_head,
    call_of,
    decayed,
    gates_of,
    input_specs,
    kept,
    key_blocks,
    keys_of,
    logits,
    product,
    queries_of,
    visible,
    walk,
)
from pallas_kernels.pairs import Decay, PairTiles, Places


def forward(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    places: Places | None,
    decay: Decay | None,
    gate: Array | None,
    seed: Array | None,
    *,
    lag: int,
    window: int | None,
    rate: float,
    precision: Precision | None,
    clamp: float | None,
    config: PairTiles,
    interpret: bool,
) -> tuple[Array, Array]:
    """Average values: y_i = Σ_j softmax_j(min(scale q_i·k_j, clamp) + F_i - F_j) gate_j v_j.

    Grid (T / block_q, H, B), the last rows, which see most, first; a program owns block_q queries
    of one head and walks over the key blocks that these may see: first those that a window cuts,
    then whole ones without a mask, then those on the diagonal. Accumulation, maximum and sum in
    float32.
    Shared memory: `launch.shared_bytes`. FLOPs 2 (K + V) per visible pair; bytes of q, k, v and y,
    with k and v read once per query block, mostly from the cache.

    Args:
      q: queries [B T H K].
      k: keys [B S G K], of the queries' dtype; G divides H.
      v: values [B S G V].
      scale: factor of the logits [H], float32.
      places: where queries and keys stand; None: at their index.
      decay: cumulative log forget gates F; None: F = 0.
      gate: factors of the values [B H S], float32; None: 1.
      seed: words of the dropout's seed [2], uint32; None without dropout.
      lag: a key is visible from this many places after it on.
      window: to fewer than this many places after it; None: for ever.
      rate: probability of dropping a weight.
      precision: of float32 products; None: three TF32 passes for logits, one for values.
      clamp: largest scale q·k; None: unbounded.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      y [B T H V] in the dtype of the values, 0 where nothing is visible, and the logarithm to base
      2 of the softmax's denominator [B H T], float32, -inf there.
    """
    batch, queries, heads, _ = q.shape
    tiles = (config.block_q, config.block_k)
    call = call_of(q, k, v, tiles, lag, window, rate, precision, clamp, interpret)
    bounds = None if places is None else block_bounds(call, places, axis=2)
    spec, blocks = functools.partial(by_head, call), -(-queries // call.block_q)
    block_y = (None, call.block_q, None, power_of_two(call.value_width))
    return launch(
        functools.partial(_kernel, call=call),
        name="attention_forward",
        grid=(blocks, heads, batch),
        in_specs=input_specs(spec, scale, q, k, v, places, bounds, decay, gate, seed),
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
    )(scale, q, k, v, places, bounds, decay, gate, seed)


def _kernel(
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    places: Places | None,
    bounds: Bounds | None,
    decay: Decay | None,
    gate_ref: Any,
    seed_ref: Any,
    y_ref: Any,
    lse_ref: Any,
    *,
    call: Call,
) -> None:
    number, head, row = (pl.program_id(axis) for axis in range(3))
    block = pl.num_programs(0) - 1 - number
    start = block * call.block_q
    scale = scale_ref[head]
    q = tile(q_ref, start, call.block_q, call.queries, call.width)
    queries = queries_of(call, start, places, axis=0)

    def visit(n: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple:
        top, total, acc = carry
        at = n * call.block_k
        k = tile(k_ref, at, call.block_k, call.keys, call.width)
        v = tile(v_ref, at, call.block_k, call.keys, call.value_width)
        keys = keys_of(call, at, places, axis=1)
        logit = logits(call, q, k, scale).value
        logit = decayed(call, decay, logit, (), start, at, axis=0)
        if masked:
            logit = jnp.where(visible(call, queries, keys), logit, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logit, axis=1))
        # Where nothing was visible so far, exp2(-inf - 0) is 0 and exp2(-inf + inf) would be NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade = jnp.exp2(top - base)
        weights = softmax_weights(logit, base[:, None])
        total = total * fade + jnp.sum(weights, axis=1)
        factor = kept(call, seed_ref, row, head, queries, keys)
        gate = gates_of(call, gate_ref, at, (), axis=1)
        read = weights if factor is None else weights * factor
        read = (read if gate is None else read * gate).astype(v.dtype)
        return new_top, total, acc * fade[:, None] + product(call, read, v)

    carry = (
        jnp.full((call.block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((call.block_q,), jnp.float32),
        jnp.zeros((call.block_q, y_ref.shape[-1]), jnp.float32),
    )
    top, total, acc = walk(key_blocks(call, block, bounds), visit, carry)
    safe = jnp.where(total < 0.5, 1.0, total)
    store_tile(y_ref, acc / safe[:, None], start, call.queries, call.value_width)
    lse = top + jnp.log2(safe)
    store(lse_ref.at[:], lse, inside(start, call.block_q, call.queries))
