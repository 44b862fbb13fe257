"""Attention with any similarity of query and key, in plain JAX: blocks of queries, all their keys.

y_i = Σ_j κ(scale q_i·k_j) e^{F_i - F_j} v_j and the sums of weights, over the visible keys

The weights of one block of queries are in memory at a time; the backward pass makes them again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import Places, Rule, visible
from jaxmem.ops.norms import at_least_float32
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import on_cpu
from pallas_kernels.attention import Decay

Similarity = Callable[[Array], Array]
"""κ: from scaled products of queries and keys to weights, elementwise."""
CPU_BLOCK = 128
GPU_BLOCK = 512
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


def similarity_sums(
    similarity: Similarity, pairs: Pairs, *, scale: float, precision: Precision | None
) -> tuple[Array, Array]:
    """Return weighted sums of values [B T H V] and sums of weights [B T H], float32 or wider."""
    pairs = pairs._replace(**{n: at_least_float32(getattr(pairs, n)) for n in ("q", "k", "v")})
    length, keys = pairs.q.shape[1], pairs.k.shape[1]
    block = CPU_BLOCK if on_cpu() else GPU_BLOCK
    size_q, size_k = min(length, block), keys if length == 1 else min(keys, block)
    blocks_q = _cut_queries(pairs, size_q)
    blocks_k = _cut_keys(pairs, size_k)

    def strip(of_q: _Side) -> tuple[Array, Array]:
        def add(sums: tuple[Array, Array], of_k: _Side) -> tuple[tuple[Array, Array], None]:
            seen = _seen(of_q, of_k)

            def more() -> tuple[Array, Array]:
                weights = _weights(similarity, of_q, of_k, seen, scale, precision)
                read = jnp.einsum("bhts,bhsv->bhtv", weights, of_k.v, precision=precision)
                return sums[0] + read, sums[1] + jnp.sum(weights, axis=-1)

            return lax.cond(jnp.any(seen), more, lambda: sums), None

        shape = (*blocks_k.x.shape[1:3], size_q)
        wide = pairs.q.dtype
        start = jnp.zeros((*shape, pairs.v.shape[-1]), wide), jnp.zeros(shape, wide)
        return lax.scan(add, start, blocks_k)[0]

    y, total = lax.map(jax.checkpoint(strip), blocks_q)
    return _joined(y)[:, :length], _joined(total)[:, :length]


def _joined(blocks: Array) -> Array:
    """Merge [N B H t ...] into [B T H ...]."""
    blocks = jnp.moveaxis(blocks, (0, 3), (1, 2))
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


class _Side(NamedTuple):
    """Blocks of queries, or of keys, along a leading axis."""

    x: Array
    """[B H t K]"""
    v: Array | None
    """[B H t V]; None for queries."""
    decay: tuple[Array, Array] | None
    """[B H t] each"""
    place: Array
    """[1|B t]"""
    segment: Array
    """[1|B t], 0 where there is no token."""


def _cut_queries(pairs: Pairs, size: int) -> _Side:
    decay = None if pairs.decay is None else (pairs.decay.query, pairs.decay.query_rest)
    places = pairs.places
    where = (None, None) if places is None else (places.query, places.query_segment)
    return _cut(pairs.q, None, decay, where, size)


def _cut_keys(pairs: Pairs, size: int) -> _Side:
    decay = None if pairs.decay is None else (pairs.decay.key, pairs.decay.key_rest)
    places = pairs.places
    where = (None, None) if places is None else (places.key, places.key_segment)
    return _cut(pairs.k, pairs.v, decay, where, size)


def _cut(
    x: Array,
    v: Array | None,
    decay: tuple[Array, Array] | None,
    where: tuple[Array | None, Array | None],
    size: int,
) -> _Side:
    """Cut one side of the pairs into blocks along a new first axis; what fills them is unseen."""
    length = x.shape[1]
    place, segment = where
    if place is None or segment is None:
        place = jnp.arange(length)[None]
        segment = jnp.ones_like(place)

    def blocks(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, -length % size), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(a.shape[0], -1, size, *a.shape[2:])

    def per_head(a: Array) -> Array:  # [B T H ...] to [N B H t ...]
        return jnp.moveaxis(blocks(a), (1, 3), (0, 2))

    return _Side(
        per_head(x),
        None if v is None else per_head(v),
        None if decay is None else tuple(per_head(jnp.moveaxis(a, 1, 2)) for a in decay),
        jnp.moveaxis(blocks(place), 1, 0),
        jnp.moveaxis(blocks(segment), 1, 0),
    )


def _seen(of_q: _Side, of_k: _Side) -> Array:
    """Return which queries see which keys [1|B t s]."""
    places = Places(of_q.place, of_k.place, of_q.segment, of_k.segment)
    return visible(CAUSAL, places, of_q.place, of_k.place)


def _weights(
    similarity: Similarity,
    of_q: _Side,
    of_k: _Side,
    seen: Array,
    scale: float,
    precision: Precision | None,
) -> Array:
    """Return the weights of a block of queries and one of keys [B H t s]."""
    seen = seen[:, None]
    products = jnp.einsum("bhtk,bhsk->bhts", scale * of_q.x, of_k.x, precision=precision)
    # Where nothing is seen a similarity may overflow, and 0 times its gradient would be NaN.
    weights = jnp.where(seen, similarity(jnp.where(seen, products, 0.0)), 0.0)
    if of_q.decay is None or of_k.decay is None:
        return weights
    passed = of_q.decay[0][..., None] - of_k.decay[0][..., None, :]
    passed = passed + (of_q.decay[1][..., None] - of_k.decay[1][..., None, :])
    return weights * jnp.exp(jnp.where(seen, passed, -jnp.inf))
