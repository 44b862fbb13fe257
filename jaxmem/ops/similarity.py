"""Attention with any similarity of query and key, in plain JAX: blocks of queries, all their keys.

y_i = Σ_j κ(scale q_i·k_j) e^{F_i - F_j} v_j and the sums of weights, over the visible keys

The weights of one block of queries are in memory at a time; the backward pass makes them again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmem.ops.attention_terms import Places, Rule, visible
from jaxmem.ops.norms import at_least_float32
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import on_cpu
from pallas_kernels.pairs import Decay

Similarity = Callable[[Array], Array]
"""κ: from scaled products of queries and keys to weights, elementwise."""
CPU_BLOCK = 128
GPU_BLOCK = 512
MAX_BLOCKS = 16
"""Blocks of queries in a row: each is compiled by itself, with the keys up to its end."""
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
    similarity: Similarity,
    pairs: Pairs,
    *,
    scale: float,
    precision: Precision | None,
    in_row: bool,
) -> tuple[Array, Array]:
    """Return weighted sums of values [B T H V] and sums of weights [B T H], float32 or wider.

    `in_row` says that no query sees a key of a higher index, so that half of the pairs are left
    out.
    """
    pairs = pairs._replace(**{n: at_least_float32(getattr(pairs, n)) for n in ("q", "k", "v")})
    length, keys = pairs.q.shape[1], pairs.k.shape[1]
    size = max(CPU_BLOCK if on_cpu() else GPU_BLOCK, -(-length // MAX_BLOCKS))
    run = functools.partial(_block, similarity, scale, precision)
    if length > size:
        run = jax.checkpoint(run)
    found = []
    for start in range(0, length, size):
        end = min(start + size, length)
        block = _cut(pairs, slice(start, end), slice(end if in_row else keys))
        found.append(run(block, jnp.arange(start, end)))
    y, total = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return y, total


def _cut(pairs: Pairs, queries: slice, keys: slice) -> Pairs:
    decay, places = pairs.decay, pairs.places
    cuts = (queries, queries, keys, keys)
    if decay is not None:
        decay = Decay(*(a[:, :, cut] for a, cut in zip(decay, cuts, strict=True)))
    if places is not None:
        cuts = (queries, keys, queries, keys)
        places = Places(*(a[:, cut] for a, cut in zip(places, cuts, strict=True)))
    return Pairs(pairs.q[:, queries], pairs.k[:, keys], pairs.v[:, keys], decay, places)


def _block(
    similarity: Similarity, scale: float, precision: Precision | None, pairs: Pairs, queries: Array
) -> tuple[Array, Array]:
    """Return the sums of a block of queries, which stand at these indices."""
    product = functools.partial(jnp.einsum, precision=precision)
    seen = visible(CAUSAL, pairs.places, queries, jnp.arange(pairs.k.shape[1]))[:, None]
    products = product("bthk,bshk->bhts", scale * pairs.q, pairs.k)
    # Where nothing is seen a similarity may overflow, and 0 times its gradient would be NaN.
    weights = jnp.where(seen, similarity(jnp.where(seen, products, 0.0)), 0.0)
    if pairs.decay is not None:
        query, query_rest, key, key_rest = pairs.decay
        passed = query[..., None] - key[..., None, :]
        passed = passed + (query_rest[..., None] - key_rest[..., None, :])
        weights = weights * jnp.exp(jnp.where(seen, passed, -jnp.inf))
    y = product("bhts,bshv->bthv", weights, pairs.v)
    return y, jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)
