"""Backward kernels of squared attention: weights are computed again from the inputs alone.

With s = q·k scale, e the decay and g the cotangents: dp = <g_y, v> + g_total, ds = 2 s e dp,
dq = scale Σ_j ds k, dk = scale Σ_i ds q, dv = Σ_i s² e g_y. As 2 p dp = s ds, the gradients of the
exponents are Σ_j p dp = <q, dq> / 2 at queries and -Σ_i p dp = -<k, dk> / 2 at keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._tiles import inside, store_tile, tile, vector
from pallas_kernels.pairs import Decay, PairTiles
from pallas_kernels.squared_attention._tiles import (
    Call,
    call_of,
    decay_specs,
    faded,
    first_tokens,
    key_blocks,
    keys_of,
    last_tokens,
    owned,
    queries_of,
    query_blocks,
    scores,
    specs,
    visible,
    walk,
    weighted,
)
from pallas_kernels.squared_attention.launch import find_config


def squared_backward(
    q: Array,
    k: Array,
    v: Array,
    decay: Decay | None,
    document: Array | None,
    dy: Array,
    dtotal: Array,
    *,
    scale: float,
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return the gradients of `squared_forward`, by two kernels.

    That of queries: grid (T / backward_q, H, B), as in the forward pass; FLOPs 2 (2 K + V) per
    visible pair. That of keys and values: grid (T / backward_k, H, B); a program owns backward_k
    keys of one head and walks over the query blocks that see them; FLOPs 4 (K + V) per visible
    pair. Accumulation in float32. Shared memory: `launch.shared_bytes`. Bytes of all arguments
    twice, and of the results.

    Args:
      q: queries [B T H K]; what is not said here is as in `squared_forward`.
      k: keys [B T H K].
      v: values [B T H V].
      decay: cumulative log decay at queries and keys.
      document: number of each token's document.
      dy: cotangent of y [B T H V], of its dtype.
      dtotal: cotangent of total [B T H], float32.
      scale: factor of the products q·k.
      precision: of float32 products.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      dq, dk [B T H K] and dv [B T H V] in the dtypes of queries, keys and values; and the gradients
      of the decay's exponent at queries and at keys [B H T], float32, None without decay.

    Raises:
      LookupError: no configuration fits; `unmet` says so before.
    """
    batch, tokens, heads, width = q.shape
    config = config or find_config(q.dtype, width, v.shape[3], length=tokens, rows=batch * heads)
    call = call_of(q, v, scale, (config.backward_q, config.backward_k), precision, interpret)
    sums = None
    if decay is not None:
        sums = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)

    def run(kernel: Any, name: str, edges: Any, size: int, at: Any, *arrays: Array) -> Any:
        outputs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
        return launch(
            functools.partial(kernel, call=call),
            name=name,
            grid=(-(-tokens // size), heads, batch),
            in_specs=[*specs((q, k, v, edges, dy, dtotal)), decay_specs(decay)],
            out_specs=[*(owned(a, size, at) for a in outputs), decay_specs(sums)],
            out_shape=[*outputs, sums],
            num_warps=config.backward_warps,
            num_stages=config.backward_stages,
            interpret=interpret,
        )(q, k, v, edges, dy, dtotal, decay)

    blocks = -(-tokens // call.block_q)
    first, last = first_tokens(document), last_tokens(document)
    dq, at_queries = run(
        _queries_kernel,
        "squared_queries_gradient",
        first,
        call.block_q,
        lambda i: blocks - 1 - i,
        q,
    )
    dk, dv, at_keys = run(
        _keys_kernel, "squared_keys_gradient", last, call.block_k, lambda i: i, k, v
    )
    return dq, dk, dv, at_queries, at_keys


def _queries_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    dy_ref: Any,
    dtotal_ref: Any,
    decay: Decay | None,
    dq_ref: Any,
    sums_ref: Any,
    *,
    call: Call,
) -> None:
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * call.block_q
    q = tile(q_ref, start, call.block_q, call.tokens, call.width)
    dy = tile(dy_ref, start, call.block_q, call.tokens, call.value_width)
    dtotal = vector(dtotal_ref, start, call.block_q, call.tokens)
    queries = queries_of(call, start, first_ref, decay, axis=0)

    def visit(n: Array, acc: Array, masked: bool) -> Array:
        at = n * call.block_k
        k = tile(k_ref, at, call.block_k, call.tokens, call.width)
        v = tile(v_ref, at, call.block_k, call.tokens, call.value_width)
        keys = keys_of(call, at, None, decay, axis=1)
        grads = scores(call, dy, v) + dtotal[:, None]
        grads = faded(scores(call, q, k) * grads, queries, keys)
        if masked:
            grads = jnp.where(visible(call, queries, keys), grads, 0.0)
        return acc + weighted(call, grads, k)

    zeros = jnp.zeros((call.block_q, q_ref.shape[-1]), jnp.float32)
    acc = walk(key_blocks(call, start, first_ref), visit, zeros)
    # The scale is left out of a tile: here it costs nothing.
    dq = acc * (2.0 * call.scale * call.scale)
    store_tile(dq_ref, dq, start, call.tokens, call.width)
    _store_sums(sums_ref, q, dq, 0.5, start, call.tokens)


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    last_ref: Any,
    dy_ref: Any,
    dtotal_ref: Any,
    decay: Decay | None,
    dk_ref: Any,
    dv_ref: Any,
    sums_ref: Any,
    *,
    call: Call,
) -> None:
    """Hold tiles with keys along axis 0, so that no product needs a transposed result."""
    start = pl.program_id(0) * call.block_k
    k = tile(k_ref, start, call.block_k, call.tokens, call.width)
    v = tile(v_ref, start, call.block_k, call.tokens, call.value_width)
    keys = keys_of(call, start, last_ref, decay, axis=0)

    def visit(n: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        dk, dv = carry
        at = n * call.block_q
        q = tile(q_ref, at, call.block_q, call.tokens, call.width)
        dy = tile(dy_ref, at, call.block_q, call.tokens, call.value_width)
        dtotal = vector(dtotal_ref, at, call.block_q, call.tokens)
        queries = queries_of(call, at, None, decay, axis=1)
        dots = scores(call, k, q)
        slopes = faded(dots, queries, keys)
        if masked:
            slopes = jnp.where(visible(call, queries, keys), slopes, 0.0)
        grads = scores(call, v, dy) + dtotal[None, :]
        return dk + weighted(call, slopes * grads, q), dv + weighted(call, slopes * dots, dy)

    carry = (
        jnp.zeros((call.block_k, k_ref.shape[-1]), jnp.float32),
        jnp.zeros((call.block_k, v_ref.shape[-1]), jnp.float32),
    )
    dk, dv = walk(query_blocks(call, start, last_ref), visit, carry)
    squared = call.scale * call.scale
    dk = dk * (2.0 * squared)
    store_tile(dk_ref, dk, start, call.tokens, call.width)
    store_tile(dv_ref, dv * squared, start, call.tokens, call.value_width)
    _store_sums(sums_ref, k, dk, -0.5, start, call.tokens)


def _store_sums(
    ref: Any, values: Array, grads: Array, factor: float, start: Array, rows: int
) -> None:
    """Store factor <value, grad> of each row of a tile, if they are wanted."""
    if ref is None:
        return
    sums = jnp.sum(values.astype(jnp.float32) * grads, axis=1)
    store(ref.at[pl.ds(start, len(values))], factor * sums, inside(start, len(values), rows))
