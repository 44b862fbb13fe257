"""Attention in plain JAX tile by tile: memory grows with T and S, not with their product."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import Extras, Places, Rule, kept, softmax_weights
from jaxmem.ops.attention_xla import (
    Gradients,
    OfForget,
    Read,
    Tile,
    TileGradients,
    delta_of,
    logits_of,
    over_keys,
    per_query,
    tile_gradients,
    with_scale,
)
from pallas_kernels._interpret import on_cpu
from pallas_kernels.attention import needed_blocks
from pallas_kernels.pairs import FAR, Decay

CPU_BLOCKS = (64, 128)
"""Queries and keys of a tile on a CPU, in rows of up to 512 tokens and in longer ones."""
GPU_BLOCK = 512
"""Queries and keys of a tile elsewhere."""


def block_of(length: int) -> int:
    """Return how many queries (or keys) of this many a tile holds."""
    if not on_cpu():
        return min(length, GPU_BLOCK)
    return min(length, CPU_BLOCKS[length > 512])


def forward(rule: Rule, q: Array, k: Array, v: Array, scale: Array, extras: Extras) -> Read:
    """Walk over tiles with a running softmax; memory grows with T and S, not with their product.

    Tiles without a visible pair are left out. The tiles are not differentiated (that would keep
    their weights): see `backward`.
    """
    rows = _Rows.of(rule, q, k, v, extras)
    batch, length, heads, _ = q.shape
    wide = scale.dtype

    def one(n: Array) -> Read:
        def visit(carry: tuple[Array, Array, Array], m: Array) -> tuple[tuple, None]:
            def update(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                return _update(rule, rows.tile(n, m), scale, extras.seed, carry)

            return lax.cond(rows.needed[n, m], update, lambda same: same, carry), None

        start = (
            jnp.full((batch, heads, rows.block_q), -jnp.inf, wide),
            jnp.zeros((batch, heads, rows.block_q), wide),
            jnp.zeros((batch, rows.block_q, heads, v.shape[-1]), wide),
        )
        (top, total, acc), _ = lax.scan(visit, start, jnp.arange(rows.needed.shape[1]))
        total = jnp.where(total < 0.5, 1.0, total)
        y = (acc / per_query(total)).astype(v.dtype)
        return Read(y, top + jnp.log(total))

    y, lse = lax.map(one, jnp.arange(rows.needed.shape[0]))
    return Read(_joined(y, 1)[:, :length], _joined(lse, 2)[:, :, :length])


def _update(
    rule: Rule,
    tile: Tile,
    scale: Array,
    seed: Array | None,
    carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Add a tile to the running maximum, sum and read."""
    top, total, acc = carry
    logits = logits_of(rule, tile, scale).value
    new_top = lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1)))
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    fade = jnp.exp(top - base)
    weights = softmax_weights(logits, base[..., None])
    total = total * fade + jnp.sum(weights, axis=-1)
    if seed is not None:
        weights = weights * kept(rule, seed, tile.dropout_rows, tile.keys)
    if tile.gate is not None:
        weights = weights * tile.gate[:, :, None]
    return new_top, total, acc * per_query(fade) + over_keys(rule, weights, tile.v, scale)


def backward(
    rule: Rule, q: Array, k: Array, v: Array, scale: Array, extras: Extras, read: Read, grad: Read
) -> Gradients:
    """Walk over the tiles once more; each gives its share of all gradients."""
    rows = _Rows.of(rule, q, k, v, extras)
    block = rows.block_q
    lse = jnp.where(read.lse == -jnp.inf, 0.0, read.lse)
    lse, delta = (_padded(a, 2, block) for a in (lse, delta_of(read, grad)))
    found = _Found(_padded(grad.y, 1, block), lse, delta)
    share_of = functools.partial(_share_of, rule, rows, scale, extras.seed, found)

    def of_keys(at_queries: _AtQueries, m: Array) -> tuple[_AtQueries, _AtKeys]:
        def visit(carry: tuple[_AtQueries, _AtKeys], n: Array) -> tuple:
            at_queries, sums = carry
            of_queries, of_keys = _sides(share_of(n, m))
            sums = jax.tree.map(jnp.add, sums, of_keys)
            return (at_queries.added(of_queries, n * block), sums), None

        sums = _sides(jax.eval_shape(share_of, m, m))[1]
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)
        return lax.scan(visit, (at_queries, zeros), jnp.arange(rows.needed.shape[0]))[0]

    none = None if rows.decay is None else jnp.zeros_like(rows.decay.query)
    at_queries = _AtQueries(jnp.zeros(rows.q.shape, scale.dtype), none)
    at_queries, at_keys = lax.scan(of_keys, at_queries, jnp.arange(rows.needed.shape[1]))
    length, keys = q.shape[1], k.shape[1]
    dq, of_scale = with_scale(at_queries.q[:, :length], q, scale)
    return Gradients(
        dq,
        _joined(at_keys.k, 1)[:, :keys],
        _joined(at_keys.v, 1)[:, :keys],
        of_scale,
        _of_forget(at_queries.forget, at_keys.forget, length, keys),
        None if at_keys.gate is None else _joined(at_keys.gate, 2)[:, :, :keys],
    )


def _of_forget(
    at_queries: Array | None, at_keys: Array | None, length: int, keys: int
) -> OfForget | None:
    if at_queries is None or at_keys is None:
        return None
    return OfForget(at_queries[:, :, :length], _joined(at_keys, 2)[:, :, :keys])


class _AtQueries(NamedTuple):
    """Gradients of what belongs to queries."""

    q: Array
    forget: Array | None

    def added(self, block: "_AtQueries", start: Array) -> "_AtQueries":
        """Add those of a block of queries, the first of which is `start`."""
        forget = self.forget
        if forget is not None and block.forget is not None:
            forget = _added(forget, block.forget, start, 2)
        return _AtQueries(_added(self.q, block.q, start, 1), forget)


class _AtKeys(NamedTuple):
    """Gradients of what belongs to keys."""

    k: Array
    v: Array
    forget: Array | None
    gate: Array | None


def _sides(tile: TileGradients) -> tuple[_AtQueries, _AtKeys]:
    query, key = (None, None) if tile.forget is None else tile.forget
    return _AtQueries(tile.q, query), _AtKeys(tile.k, tile.v, key, tile.gate)


def _added(whole: Array, block: Array, start: Array, axis: int) -> Array:
    block = lax.dynamic_slice_in_dim(whole, start, block.shape[axis], axis) + block
    return lax.dynamic_update_slice_in_dim(whole, block, start, axis)


class _Found(NamedTuple):
    """What a backward pass knows of the queries, padded to whole blocks."""

    grad: Array
    """Cotangent of y [B T H V]."""
    lse: Array
    """0 where nothing is visible [B H T]."""
    delta: Array
    """<grad, y> less the cotangent of lse [B H T]."""


def _share_of(
    rule: Rule, rows: "_Rows", scale: Array, seed: Array | None, found: _Found, n: Array, m: Array
) -> TileGradients:
    """Return the gradients of query block n against key block m, zeros where it sees nothing."""

    def some() -> TileGradients:
        tile, block = rows.tile(n, m), rows.block_q
        logits, over = logits_of(rule, tile, scale)
        weights = softmax_weights(logits, _cut(found.lse, 2, n, block)[..., None])
        of_tile = _cut(found.grad, 1, n, block), _cut(found.delta, 2, n, block)
        return tile_gradients(rule, tile, scale, seed, weights, over, *of_tile)

    def none() -> TileGradients:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(some))

    return lax.cond(rows.needed[n, m], some, none)


class _Rows(NamedTuple):
    """A call cut into blocks; arrays are padded to whole ones."""

    q: Array
    k: Array
    v: Array
    places: Places | None
    decay: Decay | None
    gate: Array | None
    needed: Array
    """Which pairs of blocks may hold a visible pair, bool [N_q N_k]."""
    length: int
    """Queries before padding."""
    block_q: int
    block_k: int

    @classmethod
    def of(cls, rule: Rule, q: Array, k: Array, v: Array, extras: Extras) -> "_Rows":
        """Cut a call into blocks."""
        length, keys = q.shape[1], k.shape[1]
        block_q, block_k = block_of(length), block_of(keys)
        places, decay = extras.places, extras.decay
        stand = places
        if stand is None:
            index = jnp.arange(length)[None], jnp.arange(keys)[None]
            stand = Places(*index, *(jnp.ones_like(a) for a in index))
        needed = needed_blocks(stand, rule.lag, rule.window, block_q, block_k)
        if places is not None:
            blocks = (block_q, block_k, block_q, block_k)
            places = Places(*(_padded(a, 1, b) for a, b in zip(places, blocks, strict=True)))
        if decay is not None:
            blocks = (block_q, block_q, block_k, block_k)
            decay = Decay(*(_padded(a, 2, b) for a, b in zip(decay, blocks, strict=True)))
        gate = None if extras.gate is None else _padded(extras.gate, 2, block_k)
        q, k, v = _padded(q, 1, block_q), _padded(k, 1, block_k), _padded(v, 1, block_k)
        needed = jnp.any(needed, axis=0)
        return cls(q, k, v, places, decay, gate, needed, length, block_q, block_k)

    def tile(self, n: Array, m: Array) -> Tile:
        """Return query block n against key block m."""
        batch, _, heads, _ = self.q.shape

        def of_q(a: Array, axis: int) -> Array:
            return _cut(a, axis, n, self.block_q)

        def of_k(a: Array, axis: int) -> Array:
            return _cut(a, axis, m, self.block_k)

        places, decay = self.places, self.decay
        if places is not None:
            cuts = (of_q, of_k, of_q, of_k)
            places = Places(*(cut(a, 1) for cut, a in zip(cuts, places, strict=True)))
        if decay is not None:
            cuts = (of_q, of_q, of_k, of_k)
            decay = Decay(*(cut(a, 2) for cut, a in zip(cuts, decay, strict=True)))
        queries = n * self.block_q + jnp.arange(self.block_q)
        keys = m * self.block_k + jnp.arange(self.block_k)
        heads_of_rows = jnp.arange(batch * heads).reshape(batch, heads, 1, 1)
        return Tile(
            of_q(self.q, 1),
            of_k(self.k, 1),
            of_k(self.v, 1),
            places,
            decay,
            None if self.gate is None else of_k(self.gate, 2),
            # A padded query must see nothing: the sum of gates at it is not one.
            jnp.where(queries < self.length, queries, -FAR),
            keys,
            heads_of_rows * self.length + queries[:, None],
        )


def _cut(array: Array, axis: int, number: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(array, number * block, block, axis)


def _padded(array: Array, axis: int, block: int) -> Array:
    """Pad an axis with zeros to whole blocks."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, widths)


def _joined(blocks: Array, axis: int) -> Array:
    """Merge the leading axis of blocks [N ...] into the axis that they were cut from."""
    blocks = jnp.moveaxis(blocks, 0, axis)
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
