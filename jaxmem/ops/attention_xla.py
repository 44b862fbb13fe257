"""Attention in plain JAX: the mathematics of a tile, and all weights at once for short rows.

`attention_blocked` takes long rows tile by tile.

Arrays are [B T H K]; the H query heads are G groups of R that share a key/value head.

With weights p_ij, read factors r_ij (dropout times gates of the values), logits s_ij and a dot for
tangents: lse_i' = Σ_j p_ij s_ij' and y_i' = Σ_j p_ij (r_ij s_ij' v_j + (r_ij v_j)') - lse_i' y_i.
This is linear in the tangents and its transpose is the backward pass of FlashAttention: what the
softmax takes from a query's gradient is <dy_i, y_i>, one number.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmem.ops.attention_terms import kept, softmax_weights, visible
from jaxmem.ops.linear_map import known_tangents
from pallas_kernels._interpret import on_cpu
from pallas_kernels.attention import Operands, Rule
from pallas_kernels.pairs import Decay, Places

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


def fits_at_once(q: Array, k: Array) -> bool:
    """Return whether all weights are computed at once and kept, rather than tile by tile.

    That is so where they are no more than the keys (T <= K, as in decoding), for short rows
    (T S <= `SHORT`²), and on a GPU, where tiles cost launches, up to `WEIGHTS_LIMIT`. Rows of a
    symbolic length cannot be cut; a symbolic number of them counts as many.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return True
    if queries <= width or queries * keys <= SHORT**2:
        return True
    if not isinstance(batch, int):
        return False
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


class Tangents(NamedTuple):
    """Tangents of a tile; None: zero."""

    q: Array | None
    """Of scale q."""
    query: Array | None
    """Of the sum of log forget gates at queries [B H t]."""
    k: Array | None
    v: Array | None
    key: Array | None
    """Of that at keys [B H s]."""
    gate: Array | None


class Sums(NamedTuple):
    """Sums over the keys of a tile, in the dtype of the logits."""

    y: Array
    """[B t H V]"""
    lse: Array
    """[B H t]"""


class Weights(NamedTuple):
    """Weights of a tile [B H t s]."""

    value: Array
    over: Array | None
    """Whether the logit is clamped; None without a clamp."""


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


def read_values(rule: Rule, tile: Tile, weights: Array, scale: Array, seed: Array | None) -> Array:
    """Return Σ_s r weights v [B t H V]."""
    if seed is not None:
        weights = weights * kept(rule, seed, tile.dropout_rows, tile.keys)
    if tile.gate is not None:
        weights = weights * tile.gate[:, :, None]
    return _over_keys(rule, weights.astype(tile.v.dtype), tile.v, scale)


def tangents_of(moved: Operands, q: Array, scale: Array) -> Tangents:
    """Return the tangents of all queries and keys from those of the operands."""
    moved = known_tangents(moved)
    dq, dscale = moved.q, moved.scale
    scaled = None if dq is None else dq.astype(scale.dtype) * scale[:, None]
    if dscale is not None:
        # In one product with the keys, so that the gradient of the scale needs no pass over pairs.
        scaled = _added(scaled, q.astype(scale.dtype) * dscale[:, None])
    decay = moved.decay or Decay(None, None, None, None)
    query, key = _added(decay.query, decay.query_rest), _added(decay.key, decay.key_rest)
    return Tangents(scaled, query, moved.k, moved.v, key, moved.gate)


def tile_tangents(
    rule: Rule,
    tile: Tile,
    scale: Array,
    seed: Array | None,
    weights: Weights,
    tangents: Tangents,
) -> Sums:
    """Return Σ_s weights (r s' v + (r v)') and Σ_s weights s', linear in the tangents.

    Args:
      rule: the static part of the call.
      tile: queries and keys.
      scale: factor of the logits.
      seed: of the dropout.
      weights: p, or p times any factor per query.
      tangents: of the tile.
    """
    wide, p = scale.dtype, weights.value
    factor = None if seed is None else kept(rule, seed, tile.dropout_rows, tile.keys)
    gate = None if tile.gate is None else tile.gate[:, :, None]
    logits = _logit_tangents(rule, tile, scale, weights.over, tangents)
    shares = None if logits is None else p * logits
    read = _times(shares, gate)
    if tangents.gate is not None:
        read = _added(read, p * tangents.gate[:, :, None])
    batch, queries, heads, _ = tile.q.shape
    y = jnp.zeros((batch, queries, heads, tile.v.shape[-1]), wide)
    if read is not None:
        y += _over_keys(rule, _times(read, factor), tile.v.astype(wide), scale)
    if tangents.v is not None:
        y += _over_keys(rule, _times(_times(p, factor), gate), tangents.v.astype(wide), scale)
    lse = jnp.zeros(p.shape[:3], wide) if shares is None else jnp.sum(shares, axis=-1)
    return Sums(y, lse)


def _logit_tangents(
    rule: Rule, tile: Tile, scale: Array, over: Array | None, tangents: Tangents
) -> Array | None:
    wide, dots = scale.dtype, None
    if tangents.q is not None:
        dots = _dots(rule, tangents.q, tile.k.astype(wide), scale)
    if tangents.k is not None:
        scaled = tile.q.astype(wide) * scale[:, None]
        dots = _added(dots, _dots(rule, scaled, tangents.k.astype(wide), scale))
    if over is not None and dots is not None:
        dots = jnp.where(over, 0.0, dots)
    forget = _added(
        None if tangents.query is None else tangents.query[..., None],
        None if tangents.key is None else -tangents.key[..., None, :],
    )
    return dots if forget is None else _added(dots, jnp.where(_own(tile), 0.0, forget))


def _own(tile: Tile) -> Array:
    """Return which keys stand at a query's own place [1|B 1 t s].

    Nothing decays between a query and the key at its own place: gradients of the gates leave such
    pairs out. Under fast decay nearly all of a row's weight is theirs, and what cancels in it by
    rounding would outweigh the rest.
    """
    at = (tile.queries[None], tile.keys[None])
    query, key = at if tile.places is None else (tile.places.query, tile.places.key)
    return query[:, None, :, None] == key[:, None, None, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def at_once(rule: Rule, operands: Operands) -> Read:
    """Compute all weights at once and keep them: on a CPU they are dearer to compute again."""
    return _at_once(rule, operands).read


@functools.partial(at_once.defjvp, symbolic_zeros=True)
def _at_once_tangent(
    rule: Rule, primals: tuple[Operands], moved: tuple[Operands]
) -> tuple[Read, Read]:
    operands, saved = primals[0], _at_once(rule, *primals)
    tangents = tangents_of(*moved, operands.q, operands.scale)
    # What it does not get is computed again in the backward pass: masks, which are cheap.
    linear = jax.checkpoint(functools.partial(_at_once_linear, rule), prevent_cse=False)
    return saved.read, linear(operands, saved, tangents)


class _Saved(NamedTuple):
    read: Read
    weights: Array
    """exp(logit - row_max) [B H T S]."""
    over: Array | None
    total: Array
    """Their sum [B H T], 1 where it would be 0."""


def _at_once(rule: Rule, operands: Operands) -> _Saved:
    """Divide by the sum of the weights after the product with the values.

    Dividing the (T, V) result rather than the (T, S) weights saves two passes over the largest
    array.
    """
    tile, scale, v = _whole(operands), operands.scale, operands.v
    logits, over = logits_of(rule, tile, scale)
    row_max = jnp.max(logits, axis=-1, keepdims=True)
    # A row without visible keys has -inf here; exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
    weights = softmax_weights(logits, jnp.where(row_max == -jnp.inf, 0.0, row_max))
    total = jnp.sum(weights, axis=-1)
    total = jnp.where(total < 0.5, 1.0, total)
    y = read_values(rule, tile, weights, scale, operands.seed) / per_query(total)
    lse = row_max[..., 0] + jnp.log(total)
    return _Saved(Read(y.astype(v.dtype), lse), weights, over, total)


def _at_once_linear(rule: Rule, operands: Operands, saved: _Saved, tangents: Tangents) -> Read:
    tile, weights = _whole(operands), Weights(saved.weights, saved.over)
    sums = tile_tangents(rule, tile, operands.scale, operands.seed, weights, tangents)
    sums = Sums(sums.y / per_query(saved.total), sums.lse / saved.total)
    return read_tangent(saved.read, sums)


def read_tangent(read: Read, sums: Sums) -> Read:
    """Return the tangents of a read from sums over all keys with the weights p."""
    y = sums.y - read.y.astype(sums.y.dtype) * per_query(sums.lse)
    return Read(y.astype(read.y.dtype), sums.lse)


def per_query(values: Array) -> Array:
    """Broadcast [B H T] along the values, [B T H 1]."""
    return jnp.moveaxis(values, 1, 2)[..., None]


def _whole(operands: Operands) -> Tile:
    """Return the tile of all queries and keys."""
    q, k, v, _, places, decay, gate, _ = operands
    batch, length, heads, _ = q.shape
    rows = jnp.arange(batch * heads * length, dtype=jnp.int32).reshape(batch, heads, length, 1)
    index = jnp.arange(length), jnp.arange(k.shape[1])
    return Tile(q, k, v, places, decay, gate, *index, rows)


def _dots(rule: Rule, q: Array, k: Array, scale: Array) -> Array:
    """Return q·k of every pair [B H T S], in the dtype of `scale`."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    dots = _product("btgrk,bsgk->bgrts", grouped, k, scale, rule)
    return dots.reshape(batch, heads, length, k.shape[1])


def _over_keys(rule: Rule, weights: Array, v: Array, scale: Array) -> Array:
    """Return Σ_s weights v [B T H V]."""
    batch, heads, length, keys = weights.shape
    groups, width = v.shape[2:]
    grouped = weights.reshape(batch, groups, heads // groups, length, keys)
    read = _product("bgrts,bsgv->btgrv", grouped, v, scale, rule)
    return read.reshape(batch, length, heads, width)


def _product(formula: str, a: Array, b: Array, scale: Array, rule: Rule) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=scale.dtype, precision=rule.precision)


def _added(a: Array | None, b: Array | None) -> Array | None:
    """Add tangents; None is zero."""
    return b if a is None else a if b is None else a + b


def _times(a: Any, factor: Array | None) -> Any:
    """Multiply a tangent, of which None is zero, by a factor, of which None is one."""
    return a if a is None or factor is None else a * factor
