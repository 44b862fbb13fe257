"""Backward kernels of attention: weights are computed again from the saved log-sum-exp.

With p the weights, c the dropout factors, a the gates of the values, g the cotangent of y, and
Δ_i = <g_i, y_i> less the cotangent of lse_i: ds = p (c a <g, v> - Δ), dq = scale Σ_j ds k,
dk = scale Σ_i ds q, both without pairs that exceed the clamp, dv = Σ_i p c a g, the gradient of a
is Σ_i p c <g, v>, and those of the gates' sum F Σ_j ds at a query and -Σ_i ds at a key, both
without pairs of one place: nothing decays between these, and under fast decay their rounding would
outweigh the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import launch, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import inside, softmax_weights, store_tile, tile, vector
from pallas_kernels.attention._tiles import (
    Bounds,
    Call,
    Keys,
    Operands,
    Queries,
    Rule,
    Saved,
    block_bounds,
    by_group,
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
    query_blocks,
    saved_specs,
    visible,
    walk,
)
from pallas_kernels.pairs import PairTiles


def queries_gradient(
    operands: Operands, saved: Saved, rule: Rule, *, config: PairTiles, interpret: bool
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of the queries, of the scale and of the gates' sum at the queries.

    Grid (T / backward_q, H, B); a program owns backward_q queries of one head and walks over the
    key blocks that these see, as in the forward pass. Accumulation in float32. Shared memory:
    `launch.shared_bytes`. FLOPs 2 (2 K + V) per visible pair; bytes of q, k, v, g and dq.

    Args:
      operands: the arrays of the call.
      saved: statistics and cotangents of its queries.
      rule: what else is static, as in `forward`.
      config: tiles.
      interpret: evaluate with plain JAX instead of a GPU.

    Returns:
      dq [B T H K] in the queries' dtype, <q, dq> / scale of every query [B H T], whose sum over
      rows and queries is the gradient of the scale, and Σ_j ds [B H T], None without `decay`;
      float32 both.
    """
    call = call_of(operands, rule, (config.backward_q, config.backward_k), interpret)
    q, decay, places = operands.q, operands.decay, operands.places
    bounds = None if places is None else block_bounds(call, places, axis=2)
    spec, blocks = functools.partial(by_head, call), -(-call.queries // call.block_q)
    block_dq = (None, call.block_q, None, power_of_two(call.width))
    block_sums = pl.BlockSpec((None, None, call.block_q), lambda i, h, b: (b, h, blocks - 1 - i))
    per_query = jax.ShapeDtypeStruct(saved.lse.shape, jnp.float32)
    return launch(
        functools.partial(_queries_kernel, call=call),
        name="attention_queries_gradient",
        grid=(blocks, call.heads, q.shape[0]),
        in_specs=[
            input_specs(spec, operands),
            saved_specs(spec, saved),
            jax.tree.map(lambda a: spec(a, "bt"), bounds),
        ],
        out_specs=[
            pl.BlockSpec(block_dq, lambda i, h, b: (b, blocks - 1 - i, h, 0)),
            block_sums,
            None if decay is None else block_sums,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            per_query,
            None if decay is None else per_query,
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(operands, saved, bounds)


def keys_gradient(
    operands: Operands, saved: Saved, rule: Rule, *, config: PairTiles, interpret: bool
) -> tuple[Array, Array, Array | None, Array | None]:
    """Return the gradients of the keys, the values, the gates' sum at the keys and their gates.

    Grid (S / backward_k, G, B); a program owns backward_k keys of one key/value head and walks,
    for each query head that shares it, over the query blocks that see them. Accumulation in
    float32. Shared memory: `launch.shared_bytes`. FLOPs 2 (2 K + 2 V) per visible pair; bytes of
    q, k, v, g, dk and dv.

    Arguments as in `queries_gradient`.

    Returns:
      dk [B S G K] and dv [B S G V] in the dtypes of keys and values, -Σ_i ds [B H S], None without
      `decay`, and the gradient of `gate` [B H S], None without it; float32 both.
    """
    call = call_of(operands, rule, (config.backward_q, config.backward_k), interpret)
    q, k, v, decay, gate = *operands[:3], operands.decay, operands.gate
    places = operands.places
    bounds = None if places is None else block_bounds(call, places, axis=1)
    spec = functools.partial(by_group, call)
    per_key = jax.ShapeDtypeStruct((q.shape[0], call.heads, call.keys), jnp.float32)
    key_sums = (None if decay is None else per_key, None if gate is None else per_key)
    owned = [(None, call.block_k, None, power_of_two(a.shape[3])) for a in (k, v)]
    return launch(
        functools.partial(_keys_kernel, call=call),
        name="attention_keys_gradient",
        grid=(-(-call.keys // call.block_k), call.groups, q.shape[0]),
        in_specs=[
            input_specs(spec, operands),
            saved_specs(spec, saved),
            jax.tree.map(lambda a: spec(a, "bt"), bounds),
        ],
        out_specs=[
            *(pl.BlockSpec(shape, lambda i, g, b: (b, i, g, 0)) for shape in owned),
            *jax.tree.map(lambda a: spec(a, "bht"), key_sums),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            *key_sums,
        ],
        num_warps=config.backward_warps,
        num_stages=config.backward_stages,
        interpret=interpret,
    )(operands, saved, bounds)


class _Gradients(NamedTuple):
    """Of the pairs of a tile, float32."""

    read: Array
    """Weights that read values."""
    logit: Array
    """Gradient of the logits."""
    dots: Array
    """Gradient of scale q·k, which a clamp stops."""
    gate: Array | None
    """Shares in the gradient of the values' gates."""


def _weights(logit: Array, over: Array | None, seen: Array | None, lse: Array) -> Array:
    """Return the weights of a tile, with a minus sign where the clamp stops the gradient.

    A tile of truth values, kept until it is needed, spills registers (16 bits, width 128, H200).
    """
    weights = softmax_weights(logit if seen is None else jnp.where(seen, logit, -jnp.inf), lse)
    return weights if over is None else jnp.where(over, -weights, weights)


def _tile_gradients(
    call: Call,
    weights: Array,
    grads: Array,
    factor: Array | None,
    gate: Array | None,
    delta: Array,
) -> _Gradients:
    signed = weights
    if call.clamp is not None:
        weights = jnp.abs(weights)
    read = weights
    if factor is not None:
        grads, read = grads * factor, weights * factor
    of_gate = None
    if gate is not None:
        of_gate = weights * grads
        grads, read = grads * gate, read * gate
    logit = weights * (grads - delta)
    dots = logit if call.clamp is None else jnp.where(signed < 0.0, 0.0, logit)
    return _Gradients(read, logit, dots, of_gate)


def _finite(lse: Array) -> Array:
    """Return the log-sum-exp, and 0 where nothing is visible."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def _queries_kernel(
    refs: Operands,
    saved: Saved,
    bounds: Bounds | None,
    dq_ref: Any,
    dscale_ref: Any,
    sums_ref: Any,
    *,
    call: Call,
) -> None:
    number, head, row = (pl.program_id(axis) for axis in range(3))
    block = pl.num_programs(0) - 1 - number
    start, size = block * call.block_q, call.block_q
    scale = refs.scale[head]
    q = tile(refs.q, start, size, call.queries, call.width)
    dy = tile(saved.dy, start, size, call.queries, call.value_width)
    lse = _finite(vector(saved.lse, start, size, call.queries))
    delta = vector(saved.delta, start, size, call.queries)
    queries: Queries = queries_of(call, start, refs.places, axis=0)

    def visit(n: Array, carry: tuple[Array, Any], masked: bool) -> tuple[Array, Any]:
        acc, sums = carry
        at = n * call.block_k
        k = tile(refs.k, at, call.block_k, call.keys, call.width)
        v = tile(refs.v, at, call.block_k, call.keys, call.value_width)
        keys = keys_of(call, at, refs.places, axis=1)
        logit, over = logits(call, q, k, scale)
        logit = decayed(call, refs.decay, logit, (), start, at, axis=0)
        seen = visible(call, queries, keys) if masked else None
        grads = _tile_gradients(
            call,
            _weights(logit, over, seen, lse[:, None]),
            product(call, dy, v, tb=True),
            dropout_mask(call, refs.seed, row, head, queries, keys),
            gates_of(call, refs.gate, at, (), axis=1),
            delta[:, None],
        )
        if sums is not None:
            sums = sums + jnp.sum(_apart(call, grads.logit, queries, keys), axis=1)
        return acc + product(call, grads.dots.astype(k.dtype), k), sums

    zeros = jnp.zeros((call.block_q, refs.q.shape[-1]), jnp.float32)
    none = None if refs.decay is None else jnp.zeros((call.block_q,), jnp.float32)
    acc, sums = walk(key_blocks(call, block, bounds), visit, (zeros, none))
    store_tile(dq_ref, acc * scale, start, call.queries, call.width)
    dscale = jnp.sum(q.astype(jnp.float32) * acc, axis=1)
    there = inside(start, call.block_q, call.queries)
    store(dscale_ref.at[:], dscale, there)
    if refs.decay is not None:
        store(sums_ref.at[:], sums, there)


def _apart(call: Call, logit: Array, queries: Queries, keys: Keys) -> Array:
    """Return the gradients of the logits without those of a query and the key at its own place."""
    if call.lag > 0:  # which it does not see
        return logit
    return jnp.where(keys.first - call.lag == queries.reach, 0.0, logit)


def _keys_kernel(
    refs: Operands,
    saved: Saved,
    bounds: Bounds | None,
    dk_ref: Any,
    dv_ref: Any,
    sums_ref: Any,
    gates_ref: Any,
    *,
    call: Call,
) -> None:
    """Hold tiles with keys along axis 0, so that no product needs a transposed result."""
    block, group, row = (pl.program_id(axis) for axis in range(3))
    start = block * call.block_k
    share = call.heads // call.groups
    k = tile(refs.k, start, call.block_k, call.keys, call.width)
    v = tile(refs.v, start, call.block_k, call.keys, call.value_width)
    keys: Keys = keys_of(call, start, refs.places, axis=0)
    there = inside(start, call.block_k, call.keys)

    def read_by(member: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        head = group * share + member
        scale, own_head = refs.scale[head], (member,)
        gate = gates_of(call, refs.gate, start, own_head, axis=0)

        def visit(n: Array, carry: tuple[Array, Array, Array, Any], masked: bool) -> tuple:
            dk, dv, sums, gates = carry
            at = n * call.block_q
            q = tile(refs.q, at, call.block_q, call.queries, call.width, head=own_head)
            dy = tile(saved.dy, at, call.block_q, call.queries, call.value_width, head=own_head)
            lse = _finite(vector(saved.lse, at, call.block_q, call.queries, lead=own_head))
            delta = vector(saved.delta, at, call.block_q, call.queries, lead=own_head)
            queries = queries_of(call, at, refs.places, axis=1)
            logit, over = logits(call, k, q, scale)
            logit = decayed(call, refs.decay, logit, own_head, at, start, axis=1)
            seen = visible(call, queries, keys) if masked else None
            grads = _tile_gradients(
                call,
                _weights(logit, over, seen, lse[None, :]),
                product(call, v, dy, tb=True),
                dropout_mask(call, refs.seed, row, head, queries, keys),
                gate,
                delta[None, :],
            )
            if refs.decay is not None:
                sums = sums - jnp.sum(_apart(call, grads.logit, queries, keys), axis=1)
            if grads.gate is not None:
                gates = gates + jnp.sum(grads.gate, axis=1)
            dots_grad = grads.dots if share == 1 else grads.dots * scale
            return (
                dk + product(call, dots_grad.astype(q.dtype), q),
                dv + product(call, grads.read.astype(dy.dtype), dy),
                sums,
                gates,
            )

        none = jnp.zeros((call.block_k,), jnp.float32)
        before = (*carry, none, None if gate is None else none)
        dk, dv, sums, gates = walk(query_blocks(call, block, bounds), visit, before)
        own = pl.ds(start, call.block_k)
        if refs.decay is not None:
            store(sums_ref.at[member, own], sums, there)
        if gate is not None:
            store(gates_ref.at[member, own], gates, there)
        return dk, dv

    zeros = (
        jnp.zeros((call.block_k, refs.k.shape[-1]), jnp.float32),
        jnp.zeros((call.block_k, refs.v.shape[-1]), jnp.float32),
    )
    if share == 1:
        dk, dv = read_by(jnp.int32(0), zeros)
        dk = dk * refs.scale[group]
    else:
        dk, dv = lax.fori_loop(0, share, read_by, zeros)
    store_tile(dk_ref, dk, start, call.keys, call.width)
    store_tile(dv_ref, dv, start, call.keys, call.value_width)
