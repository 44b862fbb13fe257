"""Forward kernel of squared attention: sums over tiles of keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._tiles import inside, store_tile, tile
from pallas_kernels.pairs import Decay, PairTiles
from pallas_kernels.squared_attention._tiles import (
    Call,
    call_of,
    decay_specs,
    faded,
    first_tokens,
    key_blocks,
    keys_of,
    owned,
    queries_of,
    scores,
    specs,
    visible,
    walk,
    weighted,
)
from pallas_kernels.squared_attention.launch import find_config


def squared_forward(
    q: Array,
    k: Array,
    v: Array,
    decay: Decay | None,
    document: Array | None,
    *,
    scale: float,
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Sum values with squared weights: y_i = Σ_j p_ij v_j and total_i = Σ_j p_ij over j <= i.

    p_ij = (scale q_i·k_j)² exp(F_i - F_j) in one document, and 0 between documents.

    Grid (T / block_q, H, B), the last queries, which see most, first; a program owns block_q
    queries of one head and walks over the key blocks of their documents: first those that may hold
    another document, then whole ones without a mask, then those on the diagonal. Weights are not
    negative, so float32 sums need no running maximum; F may grow within the range of float32.
    Shared memory: `launch.shared_bytes`. FLOPs 2 (K + V) per visible pair; bytes of q, k, v and y,
    with k and v read once per query block, mostly from the cache.

    Args:
      q: queries [B T H K].
      k: keys [B T H K], of the queries' dtype.
      v: values [B T H V].
      decay: cumulative log decay F in two words at queries and keys; None: F = 0.
      document: number of each token's document [B T], int32, never decreasing; None: one document.
      scale: factor of the products q·k.
      precision: of float32 products; None: three TF32 passes.
      config: tiles; None takes those of the tables.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      y [B T H V] in the dtype of the values, float32 for float16, and total [B T H], float32.

    Raises:
      LookupError: no configuration fits; `unmet` says so before.
    """
    batch, tokens, heads, width = q.shape
    value_width = v.shape[3]
    config = config or find_config(q.dtype, width, value_width, length=tokens, rows=batch * heads)
    call = call_of(q, v, scale, (config.block_q, config.block_k), precision, interpret)
    first, blocks = first_tokens(document), -(-tokens // config.block_q)
    out_dtype = jnp.float32 if v.dtype == jnp.float16 else v.dtype
    outputs = (
        jax.ShapeDtypeStruct((batch, tokens, heads, value_width), out_dtype),
        jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
    )
    return launch(
        functools.partial(_kernel, call=call),
        name="squared_forward",
        grid=(blocks, heads, batch),
        in_specs=[*specs((q, k, v, first)), decay_specs(decay)],
        out_specs=tuple(owned(a, config.block_q, lambda i: blocks - 1 - i) for a in outputs),
        out_shape=outputs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(q, k, v, first, decay)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    decay: Decay | None,
    y_ref: Any,
    total_ref: Any,
    *,
    call: Call,
) -> None:
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * call.block_q
    q = tile(q_ref, start, call.block_q, call.tokens, call.width)
    queries = queries_of(call, start, first_ref, decay, axis=0)

    def visit(n: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        total, acc = carry
        at = n * call.block_k
        k = tile(k_ref, at, call.block_k, call.tokens, call.width)
        v = tile(v_ref, at, call.block_k, call.tokens, call.value_width)
        keys = keys_of(call, at, None, decay, axis=1)
        dots = scores(call, q, k)
        weights = faded(dots * dots, queries, keys)
        if masked:
            weights = jnp.where(visible(call, queries, keys), weights, 0.0)
        return total + jnp.sum(weights, axis=1), acc + weighted(call, weights, v)

    carry = (
        jnp.zeros((call.block_q,), jnp.float32),
        jnp.zeros((call.block_q, y_ref.shape[-1]), jnp.float32),
    )
    total, acc = walk(key_blocks(call, start, first_ref), visit, carry)
    # The scale is left out of the weights of a tile: here it costs nothing.
    squared = call.scale * call.scale
    store_tile(y_ref, acc * squared, start, call.tokens, call.value_width)
    store(total_ref.at[:], total * squared, inside(start, call.block_q, call.tokens))
