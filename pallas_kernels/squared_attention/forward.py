"""Forward kernel of squared attention: sums over tiles of keys."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, pl, store
from pallas_kernels._tiles import inside, store_tile, tile
from pallas_kernels.pairs import PairTiles
from pallas_kernels.squared_attention._tiles import (
    Call,
    Operands,
    Outputs,
    call_of,
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
    operands: Operands,
    *,
    scale: float,
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool = False,
) -> Outputs:
    """Sum values with squared weights: y_i = Σ_j p_ij v_j and total_i = Σ_j p_ij over j <= i.

    p_ij = (scale q_i·k_j)² exp(F_i - F_j) in one document, and 0 between documents.

    Grid (T / block_q, H, B), the last queries, which see most, first; a program owns block_q
    queries of one head and walks over the key blocks of their documents: first those that may hold
    another document, then whole ones without a mask, then those on the diagonal. Weights are not
    negative, so float32 sums need no running maximum; F may grow within the range of float32.
    Shared memory: `launch.shared_bytes`. FLOPs 2 (K + V) per visible pair; bytes of q, k, v and y,
    with k and v read once per query block, mostly from the cache.

    Args:
      operands: arrays.
      scale: factor of the products q·k.
      precision: of float32 products; None: three TF32 passes.
      config: tiles; None takes those of the tables.
      interpret: evaluate with plain JAX instead of a GPU.

    Raises:
      LookupError: no configuration fits; `unmet` says so before.
    """
    q, _, v, _, document = operands
    batch, tokens, heads, width = q.shape
    value_width = v.shape[3]
    config = config or find_config(q.dtype, width, value_width, length=tokens, rows=batch * heads)
    call = call_of(q, v, scale, (config.block_q, config.block_k), precision, interpret)
    inputs = operands._replace(document=first_tokens(document))
    blocks = -(-tokens // config.block_q)
    out_dtype = jnp.float32 if v.dtype == jnp.float16 else v.dtype
    shapes = Outputs(
        jax.ShapeDtypeStruct((batch, tokens, heads, value_width), out_dtype),
        jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
    )
    owns = functools.partial(owned, size=config.block_q, at=lambda i: blocks - 1 - i)
    return launch(
        functools.partial(_kernel, call=call),
        name="squared_forward",
        grid=(blocks, heads, batch),
        in_specs=[specs(inputs)],
        out_specs=[Outputs(*map(owns, shapes))],
        out_shape=[shapes],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(inputs)[0]


def _kernel(refs: Operands, outs: Outputs, *, call: Call) -> None:
    """Sum over the keys of a block of queries; the document's ref holds where each one starts."""
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * call.block_q
    q = tile(refs.q, start, call.block_q, call.tokens, call.width)
    queries = queries_of(call, start, refs.document, refs.decay, axis=0)

    def visit(n: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        total, acc = carry
        at = n * call.block_k
        k = tile(refs.k, at, call.block_k, call.tokens, call.width)
        v = tile(refs.v, at, call.block_k, call.tokens, call.value_width)
        keys = keys_of(call, at, None, refs.decay, axis=1)
        s = scores(call, q, k)
        weights = faded(s * s, queries, keys)
        if masked:
            weights = jnp.where(visible(call, queries, keys), weights, 0.0)
        return total + jnp.sum(weights, axis=1), acc + weighted(call, weights, v)

    carry = (
        jnp.zeros((call.block_q,), jnp.float32),
        jnp.zeros((call.block_q, outs.y.shape[-1]), jnp.float32),
    )
    total, acc = walk(key_blocks(call, start, refs.document), visit, carry)
    store_tile(outs.y, acc, start, call.tokens, call.value_width)
    store(outs.total.at[:], total, inside(start, call.block_q, call.tokens))
