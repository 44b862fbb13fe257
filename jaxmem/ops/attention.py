"""Softmax attention with a visibility rule: causal, lagged, packed, or over a cache.

Key j is visible to query i when it is `lag` places or more behind it in the same document. With
lag 0 this is causal self-attention; with lag 1, keys as queries and look-ahead values it is the
contextual memory of Memory Mosaics. A query that sees no key returns 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxmem.errors import ShapeError
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import HeadScalars, Key, Keys, Queries, SegmentIds, Values

declare("attention", "xla", "reference")

_FAR_BELOW = -1e30
"""Logit of an invisible key in the reference; finite, so that an empty row has a gradient."""


class Places(NamedTuple):
    """Where queries and keys stand, when that is not simply their index in one row."""

    query: SegmentIds
    key: Int[Array, "B S"]
    query_segment: SegmentIds
    key_segment: Int[Array, "B S"]
    """Document of each key; 0 is padding or an unused cache slot and is never visible."""


class Dropout(NamedTuple):
    """Drop attention weights with probability `rate`, scaling the rest by 1 / (1 - rate)."""

    rate: float
    key: Key


def attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    scale: float | HeadScalars,
    lag: int = 0,
    places: Places | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H V"]:
    r"""Average values with softmax weights over the visible keys.

    y_i = Σ_j softmax_j(scale q_i·k_j) v_j over j with place_j + lag <= place_i, same document

    Logits and weights are float32 or wider. Cost: 2 B H T S (K + V) FLOPs forward; the XLA form
    keeps the (B, H, T, S) weights for the backward pass.

    Args:
      q: queries.
      k: keys; may be wider than the values where a large scale would magnify their rounding.
      v: values; their dtype is that of the result.
      scale: factor of the logits, one number or one per head.
      lag: how many places a key must be behind the query; 0 includes the query's own place.
      places: places and documents; None: queries and keys are one row of one document, and T = S.
      dropout: rate and key of the dropout of the weights; None in evaluation.
      implementation: `reference` walks over queries with a `lax.scan`, `xla` takes all at once.

    Raises:
      ShapeError: places is None and T differs from S, or head counts differ.

    Reference: Vaswani et al. 2017, eq. 1; Memory Mosaics (arXiv 2405.06394), eq. 4 (lag 1, q = k).
    """
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or k.shape[:3] != v.shape[:3]:
        raise ShapeError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit together. "
            "Expected q [B T H K], k [B S H K], v [B S H V]."
        )
    if places is None and q.shape[1] != k.shape[1]:
        raise ShapeError(
            f"attention: {q.shape[1]} queries and {k.shape[1]} keys without `places`. "
            "Say where each stands, or pass rows of equal length."
        )
    form = resolve("attention", implementation)
    weights = None
    if dropout is not None and dropout.rate > 0.0:
        weights = _dropout_weights(dropout, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    head_scale = jnp.broadcast_to(jnp.asarray(scale, at_least_float32(q).dtype), q.shape[2:3])
    run = _reference if form == "reference" else _xla
    return run(q, k, v, head_scale, _visible(q.shape[1], k.shape[1], lag, places), weights)


def _visible(queries: int, keys: int, lag: int, places: Places | None) -> Array:
    """Return the visibility mask, [1|B T S]."""
    if places is None:
        return jnp.tril(jnp.ones((1, queries, keys), bool), k=-lag)
    behind = places.key[:, None, :] + lag <= places.query[:, :, None]
    same = places.key_segment[:, None, :] == places.query_segment[:, :, None]
    return behind & same & (places.key_segment != 0)[:, None, :]


def _dropout_weights(dropout: Dropout, shape: tuple[int, ...]) -> Array:
    keep = 1.0 - dropout.rate
    return jax.random.bernoulli(dropout.key, keep, shape) / keep


def _reference(
    q: Array, k: Array, v: Array, scale: Array, visible: Array, dropout: Array | None
) -> Array:
    """Read one query after another, as a decoder with a cache does."""
    wide_q, wide_k, wide_v = (at_least_float32(a) for a in (q, k, v))
    visible = jnp.broadcast_to(visible, (q.shape[0], *visible.shape[1:]))
    drop = jnp.ones((q.shape[1], 1, 1, 1)) if dropout is None else jnp.moveaxis(dropout, 2, 0)

    def read(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        q_t, seen, kept = inputs  # [B H K], [B S], [B H S]
        logits = jnp.einsum("bhk,bshk->bhs", q_t, wide_k) * scale[:, None]
        seen = seen[:, None, :]
        # A query that sees nothing gets equal weights here, and none after the second mask.
        weights = jax.nn.softmax(jnp.where(seen, logits, _FAR_BELOW), axis=-1)
        weights = jnp.where(seen, weights, 0.0) * kept.astype(weights.dtype)
        return None, jnp.einsum("bhs,bshv->bhv", weights, wide_v)

    _, y = lax.scan(read, None, (jnp.moveaxis(wide_q, 1, 0), jnp.moveaxis(visible, 1, 0), drop))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype)


def _xla(
    q: Array, k: Array, v: Array, scale: Array, visible: Array, dropout: Array | None
) -> Array:
    """Compute all weights at once, dividing by their sum after the product with the values.

    Dividing the (T, V) result rather than the (T, S) weights saves two passes over the largest
    array.
    """
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=scale.dtype)
    visible = visible[:, None]
    logits = jnp.where(visible, logits * scale[:, None, None], -jnp.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # A row without visible keys has top = -inf; exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1)
    if dropout is not None:
        weights = weights * dropout.astype(weights.dtype)
    y = jnp.einsum(
        "bhts,bshv->bthv", weights.astype(v.dtype), v, preferred_element_type=scale.dtype
    )
    total = jnp.moveaxis(total, 1, 2)[..., None]
    return (y / jnp.where(total == 0.0, 1.0, total)).astype(v.dtype)
