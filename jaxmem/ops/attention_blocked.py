"""Attention in plain JAX tile by tile: memory grows with T and S, not with their product.

Queries and keys are cut into blocks, and a loop walks over the pairs of blocks that may hold a
visible pair. There are three walks: of the running softmax, of tangents, and of cotangents, which
is the transpose of the second one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmem.ops.attention_terms import softmax_weights
from jaxmem.ops.attention_xla import (
    Read,
    Sums,
    Tangents,
    Tile,
    Weights,
    logits_of,
    per_query,
    read_tangent,
    read_values,
    tangents_of,
    tile_tangents,
)
from jaxmem.ops.linear_map import linear_map
from pallas_kernels._compat import vary_like
from pallas_kernels._interpret import on_cpu
from pallas_kernels.attention import Operands, Rule, needed_blocks
from pallas_kernels.pairs import FAR, Decay, Places

CPU_BLOCKS = (64, 128)
"""Queries and keys of a tile on a CPU, in rows of up to 512 tokens and in longer ones."""
GPU_BLOCK = 512
"""Queries and keys of a tile elsewhere."""


def block_of(length: int) -> int:
    """Return how many queries (or keys) of this many a tile holds."""
    if not on_cpu():
        return min(length, GPU_BLOCK)
    return min(length, CPU_BLOCKS[length > 512])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def blocked(rule: Rule, operands: Operands) -> Read:
    """Walk over the tiles with a running softmax."""
    rows = _Rows.of(operands)

    def update(n: Array, m: Array, state: _Softmax) -> _Softmax:
        before = _at(state, n, rows.block_q)
        return _put(state, n, _updated(rule, rows.tile(n, m), operands, before))

    acc, total = rows.sums(operands.scale.dtype)
    start = _Softmax(jnp.full_like(total, -jnp.inf), total, acc)
    start = jax.tree.map(lambda a: vary_like(a, operands), start)
    row_max, total, acc = _walk(_needed_pairs(rule, rows, operands), update, start)
    total = jnp.where(total < 0.5, 1.0, total)
    y, lse = rows.real(Sums(acc / per_query(total), row_max + jnp.log(total)))
    return Read(y.astype(operands.v.dtype), lse)


class _Softmax(NamedTuple):
    """Running maximum, sum and read of blocks of queries."""

    row_max: Array
    total: Array
    acc: Array


def _updated(rule: Rule, tile: Tile, operands: Operands, state: _Softmax) -> _Softmax:
    """Add a tile to the running softmax."""
    row_max, total, acc = state
    logits = logits_of(rule, tile, operands.scale).value
    new_max = jnp.maximum(row_max, jnp.max(logits, axis=-1))
    base = jnp.where(new_max == -jnp.inf, 0.0, new_max)
    alpha = jnp.exp(row_max - base)
    weights = softmax_weights(logits, base[..., None])
    total = total * alpha + jnp.sum(weights, axis=-1)
    read = read_values(rule, tile, weights, operands.scale, operands.seed)
    return _Softmax(new_max, total, acc * per_query(alpha) + read)


@functools.partial(blocked.defjvp, symbolic_zeros=True)
def _blocked_tangent(
    rule: Rule, primals: tuple[Operands], moved: tuple[Operands]
) -> tuple[Read, Read]:
    operands, read = primals[0], blocked(rule, *primals)
    tangents = tangents_of(*moved, operands.q, operands.scale)
    shapes = jax.eval_shape(lambda: tangents)
    sums = linear_map(
        functools.partial(_sums, rule, operands, read.lse),
        functools.partial(_cotangents, rule, operands, read.lse, shapes),
        tangents,
    )
    return read, read_tangent(read, sums)


def _sums(rule: Rule, operands: Operands, lse: Array, tangents: Tangents) -> Sums:
    """Walk over the tiles once more; each adds to the sums of its queries."""
    rows = _Rows.of(operands)
    share_of = functools.partial(_share, rule, rows, operands, rows.finite(lse))
    mine, theirs = _sides(tangents)
    mine, theirs = _padded(mine, rows.block_q), _padded(theirs, rows.block_k)

    @jax.checkpoint
    def add(n: Array, m: Array, sums: Sums) -> Sums:
        tile = Tangents(*_at(mine, n, rows.block_q), *_at(theirs, m, rows.block_k))
        return _add(sums, n, share_of(n, m, tile), rows.block_q)

    sums = rows.sums(operands.scale.dtype)
    sums = jax.tree.map(lambda a: vary_like(a, operands, lse, tangents), sums)
    return rows.real(_walk(_pairs(rule, rows), add, sums))


def _cotangents(
    rule: Rule, operands: Operands, lse: Array, shapes: Tangents, grads: Sums
) -> Tangents:
    """Walk over the tiles once more; each adds to the gradients of its queries and its keys."""
    rows, dtype = _Rows.of(operands), operands.scale.dtype
    of_q, of_k = rows.block_q, rows.block_k
    share_of = functools.partial(_share, rule, rows, operands, rows.finite(lse))
    grads = _padded(grads, of_q)
    mine, theirs = _sides(jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), shapes))
    zeros = (_padded(mine, of_q), _padded(theirs, of_k))
    zeros = jax.tree.map(lambda a: vary_like(a, operands, lse, grads), zeros)
    tiles = jax.eval_shape(lambda: Tangents(*_at(zeros[0], 0, of_q), *_at(zeros[1], 0, of_k)))

    def add(n: Array, m: Array, total: tuple[tuple, tuple]) -> tuple[tuple, tuple]:
        transpose = jax.linear_transpose(functools.partial(share_of, n, m), tiles)
        (share,) = transpose(_at(grads, n, of_q))
        of_queries, of_keys = _sides(share)
        return _add(total[0], n, of_queries, of_q), _add(total[1], m, of_keys, of_k)

    mine, theirs = _walk(_needed_pairs(rule, rows, operands), add, zeros)
    return jax.tree.map(_like, Tangents(*mine, *theirs), shapes)


def _like(array: Array, shape: jax.ShapeDtypeStruct) -> Array:
    """Leave out the padding."""
    return lax.slice_in_dim(array, 0, shape.shape[_axis(array)], axis=_axis(array)).astype(
        shape.dtype
    )


def _share(
    rule: Rule,
    rows: "_Rows",
    operands: Operands,
    lse: Array,
    n: Array,
    m: Array,
    tangents: Tangents,
) -> Sums:
    """Return what a tile gives to the sums of its queries; weights are computed again."""
    tile = rows.tile(n, m)
    logits, over = logits_of(rule, tile, operands.scale)
    lse = _at(lse, n, rows.block_q)
    weights = Weights(softmax_weights(logits, lse[..., None]), over)
    return tile_tangents(rule, tile, operands.scale, operands.seed, weights, tangents)


def _sides(tangents: Tangents) -> tuple[tuple, tuple]:
    """Part what belongs to queries from what belongs to keys."""
    return tangents[:2], tangents[2:]


class _Pairs(NamedTuple):
    """Pairs of blocks to visit."""

    queries: Any
    keys: Any
    number: Any
    """How many of them, from the first one on."""


def _pairs(rule: Rule, rows: "_Rows") -> _Pairs:
    """Return the pairs of blocks that may hold a visible pair by the order of the row."""
    numbers = (rows.queries.q.shape[1] // rows.block_q, rows.keys.k.shape[1] // rows.block_k)
    n, m = np.meshgrid(*(np.arange(number) for number in numbers), indexing="ij")
    last_query = np.minimum((n + 1) * rows.block_q, rows.length) - 1
    seen = np.full(n.shape, True)
    if rule.in_order:
        seen = m * rows.block_k + rule.lag <= last_query
    if rule.in_order and rule.window is not None and rows.queries.place is None:
        last_key = np.minimum((m + 1) * rows.block_k, rows.stored) - 1
        seen &= n * rows.block_q - last_key < rule.window
    n, m = np.nonzero(seen)
    return _Pairs(n, m, len(n))


def _needed_pairs(rule: Rule, rows: "_Rows", operands: Operands) -> _Pairs:
    """Return the pairs of `_pairs`, on a CPU without those that places and documents rule out.

    Elsewhere a loop whose length is computed is a round trip to the host per tile.
    """
    if operands.places is None or not on_cpu():
        return _pairs(rule, rows)
    blocks = (rows.block_q, rows.block_k)
    needed = jnp.any(needed_blocks(operands.places, rule.lag, rule.window, *blocks), axis=0)
    order = jnp.argsort(~needed.ravel(), stable=True)
    number = needed.shape[1]
    return _Pairs(order // number, order % number, jnp.sum(needed))


def _walk(pairs: _Pairs, visit: Callable, state: Any) -> Any:
    """Return the state after visit(n, m, state) of pairs of blocks, one after another."""
    queries, keys, number = pairs
    if isinstance(number, int):
        both = (jnp.asarray(queries), jnp.asarray(keys))
        return lax.scan(lambda state, pair: (visit(*pair, state), None), state, both)[0]
    return lax.fori_loop(0, number, lambda i, state: visit(queries[i], keys[i], state), state)


class _Queries(NamedTuple):
    """What belongs to queries."""

    q: Array
    place: Array | None
    segment: Array | None
    decay: tuple[Array, ...] | None


class _Keys(NamedTuple):
    """What belongs to keys."""

    k: Array
    v: Array
    place: Array | None
    segment: Array | None
    decay: tuple[Array, ...] | None
    gate: Array | None


class _Rows(NamedTuple):
    """A call in blocks; arrays are padded to whole ones."""

    queries: _Queries
    keys: _Keys
    length: int
    """Queries before padding."""
    stored: int
    """Keys before padding."""
    block_q: int
    block_k: int

    @classmethod
    def of(cls, operands: Operands) -> "_Rows":
        """Pad a call to whole blocks."""
        q, k, v, _, places, decay, gate, _ = operands
        length, stored = q.shape[1], k.shape[1]
        block_q, block_k = block_of(length), block_of(stored)
        query, key, query_segment, key_segment = places or (None,) * 4
        forget, passed = (None, None) if decay is None else (decay[:2], decay[2:])
        queries = _padded(_Queries(q, query, query_segment, forget), block_q)
        keys = _padded(_Keys(k, v, key, key_segment, passed, gate), block_k)
        return cls(queries, keys, length, stored, block_q, block_k)

    def sums(self, dtype: Any) -> Sums:
        """Return sums of nothing for all queries."""
        batch, length, heads, _ = self.queries.q.shape
        y = jnp.zeros((batch, length, heads, self.keys.v.shape[3]), dtype)
        return Sums(y, jnp.zeros((batch, heads, length), dtype))

    def finite(self, lse: Array) -> Array:
        """Return a log-sum-exp that is 0 where nothing is visible, padded to whole blocks."""
        return _padded(jnp.where(lse == -jnp.inf, 0.0, lse), self.block_q)

    def real(self, sums: Sums) -> Sums:
        """Leave out the padding."""
        return Sums(sums.y[:, : self.length], sums.lse[:, :, : self.length])

    def tile(self, n: Array, m: Array) -> Tile:
        """Return block n of the queries against block m of the keys."""
        q, *placed, forget = _at(self.queries, n, self.block_q)
        k, v, *stored, passed, gate = _at(self.keys, m, self.block_k)
        places = decay = None
        if self.queries.place is not None:
            (query, query_segment), (key, key_segment) = placed, stored
            places = Places(query, key, query_segment, key_segment)
        if forget is not None and passed is not None:
            decay = Decay(*forget, *passed)
        batch, _, heads, _ = q.shape
        index = n * self.block_q + jnp.arange(self.block_q)
        of_keys = m * self.block_k + jnp.arange(self.block_k)
        row = jnp.arange(batch * heads).reshape(batch, heads, 1, 1) * self.length + index[:, None]
        # A padded query must see nothing: the sum of gates at it is not one.
        index = jnp.where(index < self.length, index, -FAR)
        of_keys = jnp.where(of_keys < self.stored, of_keys, FAR)
        return Tile(q, k, v, places, decay, gate, index, of_keys, row)


def _at(arrays: Any, n: Array | int, block: int) -> Any:
    """Return block n of arrays [B T], [B H T] or [B T H K]."""

    def cut(a: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, n * block, block, _axis(a))

    return jax.tree.map(cut, arrays)


def _put(arrays: Any, n: Array, blocks: Any) -> Any:
    """Replace block n of arrays."""

    def put(a: Array, b: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(a, b, n * b.shape[_axis(b)], _axis(b))

    return jax.tree.map(put, arrays, blocks)


def _add(arrays: Any, n: Array, blocks: Any, block: int) -> Any:
    return _put(arrays, n, jax.tree.map(jnp.add, _at(arrays, n, block), blocks))


def _padded(arrays: Any, block: int) -> Any:
    """Pad arrays with zeros to whole blocks."""

    def pad(a: Array) -> Array:
        widths = [(0, 0)] * a.ndim
        widths[_axis(a)] = (0, -a.shape[_axis(a)] % block)
        return jnp.pad(a, widths)

    return jax.tree.map(pad, arrays)


def _axis(array: Array) -> int:
    """Return the axis of tokens."""
    return 2 if array.ndim == 3 else 1
