"""Attention with any similarity of query and key, in plain JAX: a loop over tiles of pairs.

y_i = Σ_j κ(scale q_i·k_j) e^{F_i - F_j} v_j and the sums of weights, over the visible keys

The weights of one tile are in memory at a time; the backward pass makes them again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import Places, Rule, visible
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels._interpret import on_cpu
from pallas_kernels.pairs import Decay

Similarity = Callable[[Array], Array]
"""κ: from scaled products of queries and keys to weights, elementwise."""
CPU_BLOCK = 128
"""Sides of a tile, whose weights a cache holds: twice as fast as tiles of all keys."""
GPU_BLOCK = 512
MAX_BLOCKS = 8
"""Most blocks along a side: every tile adds to the gradient of all queries and keys.

With 16, 2048 squared products of width 32 take 254 ms on a CPU, forward and backward, with 8 218.
"""
CAUSAL = Rule(lag=0, window=None, rate=0.0, precision=None, clamp=None)


class Pairs(NamedTuple):
    """What a call reads."""

    q: Array
    """[B T H K]"""
    k: Array
    """[B S H K]"""
    v: Array
    """[B S H V]"""
    decay: Decay | None
    """F at queries [B H T] and at keys [B H S], in two numbers that add up to it."""
    places: Places | None
    """None: causal rows."""


class _Tiling(NamedTuple):
    """Tiles that may hold visible pairs."""

    block_q: int
    block_k: int
    tiles: list[tuple[int, int]]
    """First query and first key of each."""


def similarity_sums(
    similarity: Similarity,
    pairs: Pairs,
    *,
    scale: float,
    precision: Precision | None,
    in_row: bool,
) -> tuple[Array, Array]:
    """Return weighted sums of values [B T H V] and sums of weights [B T H], float32 or wider.

    `in_row` says that no query sees a key of a higher index, so that half of the tiles are left
    out.
    """
    wide = jnp.result_type(pairs.q, pairs.k, pairs.v, jnp.float32)
    q, k, v = (a.astype(wide) for a in (pairs.q, pairs.k, pairs.v))
    pairs = pairs._replace(q=scale * q, k=k, v=v)
    batch, length, heads, _ = q.shape
    if 0 in (length, k.shape[1]):
        return jnp.zeros((batch, length, heads, v.shape[3]), wide), jnp.zeros(q.shape[:3], wide)
    run = functools.partial(_tile, similarity, precision)
    tiling = _tiling(length, k.shape[1], in_row)
    if len(tiling.tiles) == 1:
        return run(pairs, jnp.arange(length), jnp.arange(k.shape[1]))
    y, total = _loop(run, pairs, tiling)
    return y[:, :length], total[:, :length]


def _tiling(length: int, keys: int, in_row: bool) -> _Tiling:
    most = CPU_BLOCK if on_cpu() else GPU_BLOCK
    block_q = _block(length, most)
    # A few queries take as many keys at a time as make a tile of the usual size.
    block_k = block_q if in_row else _block(keys, max(most, most * most // block_q))
    starts = [range(0, length, block_q), range(0, keys, block_k)]
    tiles = [(i, j) for i in starts[0] for j in starts[1] if not (in_row and j > i)]
    return _Tiling(block_q, block_k, tiles)


def _block(length: int, most: int) -> int:
    """Return the size of even blocks, near `most` unless they are too many."""
    count = min(-(-length // most), MAX_BLOCKS)
    size = -(-length // count)
    return size if count == 1 else -(-size // 16) * 16


def _loop(run: Callable, pairs: Pairs, tiling: _Tiling) -> tuple[Array, Array]:
    """Visit tiles in a scan, which is compiled once for all of them."""
    pairs = _filled(jax.tree.map(lambda a: vary_like(a, pairs), pairs), tiling)
    block_q, block_k, tiles = tiling

    @jax.checkpoint
    def visit(pairs: Pairs, i: Array, j: Array) -> tuple[Array, Array]:
        tile = _cut(pairs, (i, block_q), (j, block_k))
        return run(tile, i + jnp.arange(block_q), j + jnp.arange(block_k))

    def step(sums: tuple[Array, Array], tile: tuple[Array, Array]) -> tuple[Any, None]:
        found = visit(pairs, *tile)
        here = (tile[0], block_q)
        added = [_at(a, here, 1) + b for a, b in zip(sums, found, strict=True)]
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=tile[0], axis=1)
        return tuple(put(a, b) for a, b in zip(sums, added, strict=True)), None

    batch, length, heads, _ = pairs.q.shape
    y = jnp.zeros((batch, length, heads, pairs.v.shape[3]), pairs.v.dtype)
    start = vary_like(y, pairs), vary_like(jnp.zeros(y.shape[:3], y.dtype), pairs)
    first_query, first_key = (jnp.asarray(a) for a in zip(*tiles, strict=True))
    return lax.scan(step, start, (first_query, first_key))[0]


def _filled(pairs: Pairs, tiling: _Tiling) -> Pairs:
    """Return the pairs with rows of whole blocks; keys that are filled in are never visible."""
    queries, keys = -pairs.q.shape[1] % tiling.block_q, -pairs.k.shape[1] % tiling.block_k

    def fill(a: Array, more: int, axis: int, mode: str = "constant") -> Array:
        return jnp.pad(a, [(0, more if n == axis else 0) for n in range(a.ndim)], mode=mode)

    decay, places = pairs.decay, pairs.places
    if decay is not None:
        more = (queries, queries, keys, keys)
        # Queries that are filled in decay like the last one: others might grow beyond all floats.
        decay = Decay(*(fill(a, n, 2, "edge") for a, n in zip(decay, more, strict=True)))
    if places is not None:
        more = (queries, keys, queries, keys)
        places = Places(*(fill(a, n, 1) for a, n in zip(places, more, strict=True)))
    rows = fill(pairs.q, queries, 1), fill(pairs.k, keys, 1), fill(pairs.v, keys, 1)
    return Pairs(*rows, decay, places)


def _cut(pairs: Pairs, queries: tuple[Array, int], keys: tuple[Array, int]) -> Pairs:
    """Return a tile; queries and keys are its (start, size)."""
    decay, places = pairs.decay, pairs.places
    if decay is not None:
        cuts = (queries, queries, keys, keys)
        decay = Decay(*(_at(a, cut, 2) for a, cut in zip(decay, cuts, strict=True)))
    if places is not None:
        cuts = (queries, keys, queries, keys)
        places = Places(*(_at(a, cut, 1) for a, cut in zip(places, cuts, strict=True)))
    rows = _at(pairs.q, queries, 1), _at(pairs.k, keys, 1), _at(pairs.v, keys, 1)
    return Pairs(*rows, decay, places)


def _at(a: Array, cut: tuple[Array, int], axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, *cut, axis=axis)


def _tile(
    similarity: Similarity, precision: Precision | None, pairs: Pairs, queries: Array, keys: Array
) -> tuple[Array, Array]:
    """Return the sums of a tile whose queries, scaled already, and keys have these indices."""
    product = functools.partial(jnp.einsum, precision=precision)
    seen = visible(CAUSAL, pairs.places, queries, keys)[:, None]
    products = product("bthk,bshk->bhts", pairs.q, pairs.k)
    # Where nothing is seen a similarity may overflow, and 0 times its gradient would be NaN.
    weights = jnp.where(seen, similarity(jnp.where(seen, products, 0.0)), 0.0)
    if pairs.decay is not None:
        query, query_rest, key, key_rest = pairs.decay
        passed = query[..., None] - key[..., None, :]
        passed = passed + (query_rest[..., None] - key_rest[..., None, :])
        weights = weights * jnp.exp(jnp.where(seen, passed, -jnp.inf))
    y = product("bhts,bshv->bthv", weights, pairs.v)
    return y, jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)
