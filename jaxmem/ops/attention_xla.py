"""Attention in plain JAX: the mathematics of a tile, and all weights at once for short rows.

`attention_blocked` takes long rows tile by tile.

Arrays are [B T H K]; the H query heads are G groups of R that share a key/value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import Extras, Places, Rule, kept, softmax_weights, visible
from pallas_kernels._interpret import on_cpu
from pallas_kernels.pairs import Decay

SHORT = 128
"""Tokens up to which a CPU takes all weights of a row at once: longer ones fit its caches in tiles.

Measured at 12 rows, 4 heads of 32, float32: 11.6 against 11.5 ms forward and backward with 128
tokens, 48.8 against 36.6 ms with 256.
"""
WEIGHTS_LIMIT = 256 * 2**20
"""Bytes of the weights (B, H, T, S) up to which a GPU takes them all at once."""


class Read(NamedTuple):
    """What attention returns."""

    y: Array
    """[B T H V] in the dtype of the values."""
    lse: Array
    """Logarithm of the softmax's denominator [B H T], -inf where nothing is visible."""


class OfForget(NamedTuple):
    """Gradients of the gates' sum F at queries and at keys, without pairs of one place.

    Nothing decays between a query and the key at its own place, and their shares cancel. Under fast
    decay nearly all of a row's weight is such a pair's, and its rounding would outweigh the rest.
    """

    query: Array
    """[B H T]"""
    key: Array
    """[B H S]"""


class Gradients(NamedTuple):
    """Gradients of one call."""

    q: Array
    k: Array
    v: Array
    scale: Array
    forget: OfForget | None
    gate: Array | None
    """Of the gates of the values [B H S]."""


def fits_at_once(q: Array, k: Array) -> bool:
    """Return whether all weights are computed at once and kept, rather than tile by tile.

    That is so where they are no more than the keys (T <= K, as in decoding), for short rows
    (T S <= `SHORT`²), and on a GPU, where tiles cost launches, up to `WEIGHTS_LIMIT`.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    if queries <= width or queries * keys <= SHORT**2:
        return True
    itemsize = jnp.promote_types(q.dtype, jnp.float32).itemsize
    small = batch * heads * queries * keys * itemsize <= WEIGHTS_LIMIT
    return small and not on_cpu()


class Tile(NamedTuple):
    """Queries and keys with all that belongs to them."""

    q: Array
    k: Array
    v: Array
    places: Places | None
    decay: Decay | None
    gate: Array | None
    queries: Array
    """Indices [t]."""
    keys: Array
    """Indices [s]."""
    dropout_rows: Array
    """[B H t 1]"""


def _whole(q: Array, k: Array, v: Array, extras: Extras) -> Tile:
    """Return the tile of all queries and keys."""
    batch, length, heads, _ = q.shape
    rows = jnp.arange(batch * heads * length, dtype=jnp.int32).reshape(batch, heads, length, 1)
    index = jnp.arange(length), jnp.arange(k.shape[1])
    return Tile(q, k, v, extras.places, extras.decay, extras.gate, *index, rows)


class Logits(NamedTuple):
    """Logits of a tile [B H t s]."""

    value: Array
    """-inf where a key is not visible."""
    over: Array | None
    """Whether scale q·k exceeds the clamp, so that no gradient reaches it; None without one."""


def logits_of(rule: Rule, tile: Tile, scale: Array) -> Logits:
    """Return the logits of a tile and which of them are clamped."""
    logits, over = _dots(rule, tile.q, tile.k, scale) * scale[:, None, None], None
    if rule.clamp is not None:
        over = logits > rule.clamp
        # Not `minimum`, which halves the second derivatives where the two are equal.
        logits = jnp.where(over, rule.clamp, logits)
    if tile.decay is not None:
        query, query_rest, key, key_rest = tile.decay
        logits = logits + (query[..., None] - key[..., None, :])
        logits = logits + (query_rest[..., None] - key_rest[..., None, :])
    seen = visible(rule, tile.places, tile.queries, tile.keys)
    return Logits(jnp.where(seen[:, None], logits, -jnp.inf), over)


class TileGradients(NamedTuple):
    """What one tile adds to the gradients."""

    q: Array
    """Without the factor `scale`."""
    k: Array
    v: Array
    forget: OfForget | None
    gate: Array | None


def tile_gradients(
    rule: Rule,
    tile: Tile,
    scale: Array,
    seed: Array | None,
    weights: Array,
    over: Array | None,
    grad: Array,
    delta: Array,
) -> TileGradients:
    """Return a tile's gradients in float32 or wider.

    Args:
      rule: the static part of the call.
      tile: queries and keys.
      scale: factor of the logits.
      seed: of the dropout.
      weights: p, with any factor per query that `grad` and `delta` are divided by [B H t s].
      over: which logits are clamped.
      grad: cotangent of y [B t H V].
      delta: <grad, y> less the cotangent of the log-sum-exp [B H t].
    """
    grad = grad.astype(tile.v.dtype)
    grads, read = _dots(rule, grad, tile.v, scale), weights
    if seed is not None:
        factor = kept(rule, seed, tile.dropout_rows, tile.keys)
        grads, read = grads * factor, weights * factor
    of_gate = None
    if tile.gate is not None:
        of_gate = jnp.sum(weights * grads, axis=2)
        grads, read = grads * tile.gate[:, :, None], read * tile.gate[:, :, None]
    logit = weights * (grads - delta[..., None])
    dots = logit if over is None else jnp.where(over, 0.0, logit)
    scaled = (tile.q * scale[:, None]).astype(tile.q.dtype)
    return TileGradients(
        over_keys(rule, dots, tile.k, scale),
        _over_queries(rule, dots, scaled, tile.k.shape[2], scale),
        _over_queries(rule, read, grad, tile.v.shape[2], scale),
        _of_forget(tile, logit),
        of_gate,
    )


def _of_forget(tile: Tile, logit: Array) -> OfForget | None:
    if tile.decay is None:
        return None
    at = (tile.queries[None], tile.keys[None])
    query, key = at if tile.places is None else (tile.places.query, tile.places.key)
    own = query[:, None, :, None] == key[:, None, None, :]
    apart = jnp.where(own, 0.0, logit)
    return OfForget(jnp.sum(apart, axis=3), -jnp.sum(apart, axis=2))


class _Kept(NamedTuple):
    """Residuals of the form that keeps the weights: on a CPU they are dearer to compute again."""

    q: Array
    k: Array
    v: Array
    scale: Array
    extras: Extras
    weights: Array
    """exp(logit - max) [B H T S]."""
    over: Array | None
    total: Array
    """Their sum [B H T], 1 where it would be 0."""
    read: Read


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def at_once(rule: Rule, q: Array, k: Array, v: Array, scale: Array, extras: Extras) -> Read:
    """Compute all weights at once, dividing by their sum after the product with the values.

    Dividing the (T, V) result rather than the (T, S) weights saves two passes over the largest
    array.
    """
    return _at_once_forward(rule, q, k, v, scale, extras)[0]


def _at_once_forward(
    rule: Rule, q: Array, k: Array, v: Array, scale: Array, extras: Extras
) -> tuple[Read, _Kept]:
    tile = _whole(q, k, v, extras)
    logits, over = logits_of(rule, tile, scale)
    top = jnp.max(logits, axis=-1, keepdims=True)
    # A row without visible keys has top = -inf; exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
    empty = top[..., 0] == -jnp.inf
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = softmax_weights(logits, top)
    total = jnp.sum(weights, axis=-1)
    total = jnp.where(total < 0.5, 1.0, total)
    read = weights
    if extras.seed is not None:
        read = weights * kept(rule, extras.seed, tile.dropout_rows, tile.keys)
    if extras.gate is not None:
        read = read * extras.gate[:, :, None]
    y = over_keys(rule, read, v, scale) / per_query(total)
    lse = jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))
    result = Read(y.astype(v.dtype), lse)
    return result, _Kept(q, k, v, scale, extras, weights, over, total, result)


def _at_once_backward(rule: Rule, saved: _Kept, grad: Read) -> tuple:
    q, k, v, scale, extras, weights, over, total, read = saved
    wide = grad.y.astype(scale.dtype) / per_query(total)
    delta = delta_of(read, Read(wide, grad.lse / total))
    whole = _whole(q, k, v, extras)
    tile = tile_gradients(rule, whole, scale, extras.seed, weights, over, wide, delta)
    dq, of_scale = with_scale(tile.q, q, scale)
    grads = Gradients(dq, tile.k, tile.v, of_scale, tile.forget, tile.gate)
    return cotangents(grads, q, k, v)


def cotangents(grads: Gradients, q: Array, k: Array, v: Array) -> tuple:
    """Return what a `custom_vjp` of (q, k, v, scale, extras) returns."""
    decay = None
    if grads.forget is not None:
        query, key = grads.forget
        decay = Decay(query, jnp.zeros_like(query), key, jnp.zeros_like(key))
    dq, dk, dv = grads.q.astype(q.dtype), grads.k.astype(k.dtype), grads.v.astype(v.dtype)
    return dq, dk, dv, grads.scale, Extras(None, decay, grads.gate, None)


at_once.defvjp(_at_once_forward, _at_once_backward)


def delta_of(read: Read, grad: Read) -> Array:
    """Return <grad, y> less the cotangent of lse [B H T], what the softmax takes from ds."""
    along = jnp.sum(grad.y.astype(grad.lse.dtype) * read.y.astype(grad.lse.dtype), axis=-1)
    return jnp.moveaxis(along, 2, 1) - jnp.where(read.lse == -jnp.inf, 0.0, grad.lse)


def with_scale(dq: Array, q: Array, scale: Array) -> tuple[Array, Array]:
    """Return the gradients of queries and scale, given that of the queries without its factor."""
    return dq * scale[:, None], jnp.einsum("bthk,bthk->h", dq, q.astype(dq.dtype))


def per_query(values: Array) -> Array:
    """Broadcast [B H T] along the values, [B T H 1]."""
    return jnp.moveaxis(values, 1, 2)[..., None]


def _dots(rule: Rule, q: Array, k: Array, scale: Array) -> Array:
    """Return q·k of every pair [B H T S], in the dtype of `scale`."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    dots = _product("btgrk,bsgk->bgrts", grouped, k, scale, rule)
    return dots.reshape(batch, heads, length, -1)


def over_keys(rule: Rule, weights: Array, v: Array, scale: Array) -> Array:
    """Return Σ_s weights v [B T H V]."""
    batch, heads, length, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[2], -1, length, keys).astype(v.dtype)
    read = _product("bgrts,bsgv->btgrv", grouped, v, scale, rule)
    return read.reshape(batch, length, heads, -1)


def _over_queries(rule: Rule, weights: Array, x: Array, groups: int, scale: Array) -> Array:
    """Return Σ_t weights x, summed over the heads of each group [B S G V]."""
    batch, heads, length, keys = weights.shape
    share = heads // groups
    weights = weights.reshape(batch, groups, share, length, keys).astype(x.dtype)
    grouped = x.reshape(batch, length, groups, share, -1)
    return _product("bgrts,btgrv->bsgv", weights, grouped, scale, rule)


def _product(formula: str, a: Array, b: Array, scale: Array, rule: Rule) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=scale.dtype, precision=rule.precision)
