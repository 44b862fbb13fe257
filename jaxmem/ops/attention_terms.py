"""What the forms of attention share: places, dropout, forget gates and the rule of visibility."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmem.shapes import Key, SegmentIds
from pallas_kernels import _dropout
from pallas_kernels.attention import Rule
from pallas_kernels.pairs import FAR, Decay, Places

LOWEST_GATE = -(2.0**10)
"""What log forget gates below it count as; e^-1024 is 0 in every dtype.

A power of two, so that two words of a sum hold it exactly beside the other gates (`cumulative`).
No lower, because a query that sees nothing but keys before such a gate has logits of this size, and
their weights the error of its last bit, 6e-5.
"""


FEW = 16
"""Queries up to which `auto` takes no kernel: these are built for blocks of 128 of them."""


def places_in_row(segment_ids: SegmentIds) -> Places:
    """Return places for packed rows that attend to themselves, which padding does not count in."""
    place = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32)
    return Places(place, place, segment_ids, segment_ids)


class Dropout(NamedTuple):
    """Drop attention weights with probability `rate`, scaling the rest by 1 / (1 - rate)."""

    rate: float
    key: Key


def cumulative(log_forget: Array) -> tuple[Array, Array]:
    """Return the cumulative sum over axis 1 as two numbers that add up to it, [B T H] each.

    The first is a sum of multiples of a power of two so coarse that it is exact in any order; the
    second sums what is left. A plain sum over a long row loses the digits that the difference of
    two near tokens needs. The gradient flows through the first.
    """
    return _cumulative(log_forget)


@jax.custom_jvp
def _cumulative(log_forget: Array) -> tuple[Array, Array]:
    digits = jnp.finfo(log_forget.dtype).nmant - 1
    total = jnp.sum(jnp.abs(log_forget), axis=1, keepdims=True)
    _, exponent = jnp.frexp(total)
    unit = jnp.ldexp(jnp.ones_like(total), exponent - digits)
    coarse = jnp.round(log_forget / unit) * unit
    return jnp.cumsum(coarse, axis=1), jnp.cumsum(log_forget - coarse, axis=1)


@_cumulative.defjvp
def _differentiate_cumulative(primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    tangent = jnp.cumsum(tangents[0], axis=1)
    return _cumulative(*primals), (tangent, jnp.zeros_like(tangent))


def visible(rule: Rule, places: Places | None, queries: Array, keys: Array) -> Array:
    """Return which queries see which keys, [1|B T S].

    Without `places` they stand at their indices `queries` [T] and `keys` [S]; a query at -FAR and a
    key at FAR are not there.
    """
    if places is None and not rule.causal:
        return (queries >= 0)[None, :, None] & (keys < FAR)[None, None, :]
    if places is None:
        return _near_enough(rule, queries[None, :, None], keys[None, None, :])
    seen = _near_enough(rule, places.query[:, :, None], places.key[:, None, :])
    same = places.query_segment[:, :, None] == places.key_segment[:, None, :]
    return seen & same & (places.key_segment != 0)[:, None, :]


def _near_enough(rule: Rule, query: Array, key: Array) -> Array:
    seen = key + rule.lag <= query
    return seen if rule.window is None else seen & (query - key < rule.window)


def softmax_weights(logits: Array, maximum: Array) -> Array:
    """Return e^(logits - maximum), at most 1; `maximum` is the largest logit or the log-sum-exp.

    Both may come from logits that were rounded otherwise, by a bit that a large scale makes large.
    So the largest weight, and with it a sum of weights, may be below 1 too. Callers differentiate
    the maximum like anything else: where `stop_gradient` hides it inside a scan, JAX 0.10 computes
    wrong second derivatives.
    """
    return jnp.exp(_at_most_zero(logits - maximum))


@jax.custom_jvp
def _at_most_zero(exponents: Array) -> Array:
    return jnp.minimum(exponents, 0.0)


# What exceeds 0 by rounding, and the largest logit itself, have a gradient like all others.
_at_most_zero.defjvps(lambda tangent, _, exponents: tangent)


def kept(rule: Rule, seed: Array, row: Array, keys: Array) -> Array:
    """Return the dropout factors of weights: 1 / (1 - rate) where kept, 0 where dropped.

    Args:
      rule: holds the rate.
      seed: words of the seed.
      row: (row · H + head) · T + query, broadcast against `keys`.
      keys: indices of the keys.
    """
    return _dropout.kept(seed[0], seed[1], row, keys.astype(jnp.int32), rule.rate)


def gates_at(log_forget: Array, slots: Array | None) -> Decay:
    """Return the cumulative gates at queries, in their own slots if None, and at keys [B H T].

    Args:
      log_forget: gates of the keys [B S H], in the dtype of logits.
      slots: slot of each query [B T] if that is not its own index.
    """
    sums = cumulative(log_forget)  # [B S H] twice
    at_queries = sums
    if slots is not None:
        slot = jnp.maximum(slots, 0)[..., None]
        at_queries = tuple(jnp.take_along_axis(a, slot, axis=1) for a in sums)
    return Decay(*(jnp.moveaxis(a, 1, 2) for a in (*at_queries, *sums)))
