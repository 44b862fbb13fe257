"""Backward kernels of squared attention: weights are computed again from the inputs alone.

With s = q·k scale, e the decay and g the cotangents: dp = <g_y, v> + g_total, ds = 2 s e dp,
dq = scale Σ_j ds k, dk = scale Σ_i ds q, dv = Σ_i s² e g_y. As 2 p dp = s ds, the gradients of the
exponents are Σ_j p dp = <q, dq> / 2 at queries and -Σ_i p dp = -<k, dk> / 2 at keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._tiles import inside, store_tile, tile, vector
from pallas_kernels.pairs import Decay, PairTiles
from pallas_kernels.squared_attention._tiles import (
    Call,
    Operands,
    Outputs,
    by_head,
    call_of,
    dots,
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
    whole,
)
from pallas_kernels.squared_attention.launch import find_config


class Inputs(NamedTuple):
    """What the kernels read."""

    operands: Operands
    """Those of the forward pass, with the edges of documents in place of their numbers."""
    grads: Outputs
    """Cotangents."""


class QueryGrads(NamedTuple):
    """What the kernel of the queries writes."""

    dq: Any
    """[B T H K]"""
    exponent: Any
    """Gradient of the decay's exponent at queries [B H T], float32, or None."""


class KeyGrads(NamedTuple):
    """What the kernel of keys and values writes."""

    dk: Any
    """[B T H K]"""
    dv: Any
    """[B T H V]"""
    exponent: Any
    """Gradient of the decay's exponent at keys [B H T], float32, or None."""


def squared_backward(
    operands: Operands,
    grads: Outputs,
    *,
    scale: float,
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Decay | None]:
    """Return the gradients of `squared_forward`, by two kernels.

    That of queries: grid (T / backward_q, H, B), as in the forward pass; FLOPs 2 (2 K + V) per
    visible pair. That of keys and values: grid (T / backward_k, H, B); a program owns backward_k
    keys of one head and walks over the query blocks that see them; FLOPs 4 (K + V) per visible
    pair. Accumulation in float32. Shared memory: `launch.shared_bytes`. Bytes of all arguments
    twice, and of the results.

    Args:
      operands: arrays of the forward pass.
      grads: cotangents of its outputs, of their dtypes.
      scale: factor of the products q·k.
      precision: of float32 products.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      dq, dk [B T H K] and dv [B T H V] in the dtypes of queries, keys and values; and the gradient
      of the decay, float32, all of it in the first words, or None.

    Raises:
      LookupError: no configuration fits; `unmet` says so before.
    """
    q, k, v, decay, document = operands
    batch, tokens, heads, width = q.shape
    config = config or find_config(q.dtype, width, v.shape[3], length=tokens, rows=batch * heads)
    call = call_of(q, v, scale, (config.backward_q, config.backward_k), precision, interpret)
    exponent = None
    if decay is not None:
        exponent = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    dq, dk, dv = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v))

    def run(kernel: Callable, name: str, edges: Any, shapes: Any, size: int, at: Callable) -> Any:
        inputs = Inputs(operands._replace(document=edges), grads)
        blocks = (owned(a, size, at) for a in shapes[:-1])
        return launch(
            functools.partial(kernel, call=call),
            name=name,
            grid=(-(-tokens // size), heads, batch),
            in_specs=[Inputs(specs(inputs.operands), whole(grads))],
            out_specs=[type(shapes)(*blocks, by_head(exponent))],
            out_shape=[shapes],
            num_warps=config.backward_warps,
            num_stages=config.backward_stages,
            interpret=interpret,
        )(inputs)[0]

    blocks = -(-tokens // call.block_q)
    of_queries = run(
        _queries_kernel,
        "squared_queries_gradient",
        first_tokens(document),
        QueryGrads(dq, exponent),
        call.block_q,
        lambda i: blocks - 1 - i,
    )
    of_keys = run(
        _keys_kernel,
        "squared_keys_gradient",
        last_tokens(document),
        KeyGrads(dk, dv, exponent),
        call.block_k,
        lambda i: i,
    )
    if decay is not None:
        rest = jnp.zeros_like(of_queries.exponent)
        decay = Decay(of_queries.exponent, rest, of_keys.exponent, rest)
    return of_queries.dq, of_keys.dk, of_keys.dv, decay


def _queries_kernel(refs: Inputs, outs: QueryGrads, *, call: Call) -> None:
    operands, grads = refs
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * call.block_q
    q = tile(operands.q, start, call.block_q, call.tokens, call.width)
    dy = tile(grads.y, start, call.block_q, call.tokens, call.value_width)
    dtotal = vector(grads.total, start, call.block_q, call.tokens)
    queries = queries_of(call, start, operands.document, operands.decay, axis=0)

    def visit(n: Array, acc: Array, masked: bool) -> Array:
        at = n * call.block_k
        k = tile(operands.k, at, call.block_k, call.tokens, call.width)
        v = tile(operands.v, at, call.block_k, call.tokens, call.value_width)
        keys = keys_of(call, at, None, operands.decay, axis=1)
        dp = dots(call, dy, v) + dtotal[:, None]
        ds = faded(scores(call, q, k) * dp, queries, keys)
        if masked:
            ds = jnp.where(visible(call, queries, keys), ds, 0.0)
        return acc + weighted(call, ds, k)

    zeros = jnp.zeros((call.block_q, operands.q.shape[-1]), jnp.float32)
    acc = walk(key_blocks(call, start, operands.document), visit, zeros)
    # The factor is left out of a tile: here it costs nothing.
    dq = acc * (2.0 * call.scale)
    store_tile(outs.dq, dq, start, call.tokens, call.width)
    _store_exponents(outs.exponent, q, dq, 0.5, start, call.tokens)


def _keys_kernel(refs: Inputs, outs: KeyGrads, *, call: Call) -> None:
    """Hold tiles with keys along axis 0, so that no product needs a transposed result."""
    operands, grads = refs
    start = pl.program_id(0) * call.block_k
    k = tile(operands.k, start, call.block_k, call.tokens, call.width)
    v = tile(operands.v, start, call.block_k, call.tokens, call.value_width)
    keys = keys_of(call, start, operands.document, operands.decay, axis=0)

    def visit(n: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        dk, dv = carry
        at = n * call.block_q
        q = tile(operands.q, at, call.block_q, call.tokens, call.width)
        dy = tile(grads.y, at, call.block_q, call.tokens, call.value_width)
        dtotal = vector(grads.total, at, call.block_q, call.tokens)
        queries = queries_of(call, at, None, operands.decay, axis=1)
        s = scores(call, k, q)
        slopes = faded(s, queries, keys)
        if masked:
            slopes = jnp.where(visible(call, queries, keys), slopes, 0.0)
        dp = dots(call, v, dy) + dtotal[None, :]
        return dk + weighted(call, slopes * dp, q), dv + weighted(call, slopes * s, dy)

    carry = (
        jnp.zeros((call.block_k, operands.k.shape[-1]), jnp.float32),
        jnp.zeros((call.block_k, operands.v.shape[-1]), jnp.float32),
    )
    dk, dv = walk(query_blocks(call, start, operands.document), visit, carry)
    dk = dk * (2.0 * call.scale)
    store_tile(outs.dk, dk, start, call.tokens, call.width)
    store_tile(outs.dv, dv, start, call.tokens, call.value_width)
    _store_exponents(outs.exponent, k, dk, -0.5, start, call.tokens)


def _store_exponents(
    ref: Any, values: Array, grads: Array, factor: float, start: Array, rows: int
) -> None:
    """Store factor <value, grad> of each row of a tile, if they are wanted."""
    if ref is None:
        return
    sums = jnp.sum(values.astype(jnp.float32) * grads, axis=1)
    store(ref.at[pl.ds(start, len(values))], factor * sums, inside(start, len(values), rows))
