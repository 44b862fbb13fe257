"""Attention query by query, the definition that every other form is compared with."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import kept, softmax_weights
from jaxmem.ops.attention_xla import Read
from jaxmem.ops.norms import at_least_float32
from pallas_kernels.attention import Operands, Rule
from pallas_kernels.pairs import Places

_FAR_BELOW = -1e30
"""Logit of an invisible key; finite, so that an empty row has a gradient."""


def read(rule: Rule, operands: Operands, slots: Array | None, log_forget: Array | None) -> Read:
    """Read one query after another, as a decoder with a cache does.

    Args:
      rule: the static part of the call.
      operands: its arrays; `decay` is not looked at.
      slots: slot of each query [B T] if that is not its own index.
      log_forget: gates of the keys [B S H].
    """
    q, k, v, scale, places, _, gate, seed = operands
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    heads_per_group = heads // k.shape[2]
    wide_k, wide_v = (jnp.repeat(at_least_float32(a), heads_per_group, axis=2) for a in (k, v))
    if places is None:
        index = tuple(jnp.broadcast_to(jnp.arange(n), (batch, n)) for n in (length, keys))
        ones = tuple(jnp.ones_like(a) for a in index)
        places = Places(*(index if rule.causal else ones), *ones)
    if slots is None:
        slots = jnp.broadcast_to(jnp.arange(length), (batch, length))
    first_row = jnp.arange(batch * heads).reshape(batch, heads, 1) * length

    def step(_: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        q_t, place, segment, slot, t = inputs  # [B H K], [B], [B], [B], []
        logits = jnp.einsum("bhk,bshk->bhs", q_t, wide_k) * scale[:, None]
        if rule.clamp is not None:
            # Not `minimum`, which halves the gradient where the two are equal.
            logits = jnp.where(logits > rule.clamp, rule.clamp, logits)
        behind = place[:, None] - places.key
        seen = (behind >= rule.lag) & (places.key_segment == segment[:, None])
        seen &= places.key_segment != 0
        if rule.window is not None:
            seen &= behind < rule.window
        seen = seen[:, None, :]
        if log_forget is not None:
            logits = logits + _passed(log_forget, slot)
        logits = jnp.where(seen, logits, _FAR_BELOW)
        # A query that sees nothing gets equal weights here, and none after the second mask.
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.where(seen, softmax_weights(logits, lse[..., None]), 0.0)
        lse = jnp.where(jnp.any(seen, axis=-1), lse, -jnp.inf)
        if seed is not None:
            weights = weights * kept(rule, seed, first_row + t, jnp.arange(keys))
        if gate is not None:
            weights = weights * gate
        return None, (jnp.einsum("bhs,bshv->bhv", weights, wide_v), lse)

    rows = (at_least_float32(q), places.query, places.query_segment, slots)
    inputs = (*(jnp.moveaxis(a, 1, 0) for a in rows), jnp.arange(length))
    _, (y, lse) = lax.scan(step, None, inputs)
    return Read(jnp.moveaxis(y, 0, 1).astype(v.dtype), jnp.moveaxis(lse, 0, 2))


def _passed(log_forget: Array, slot: Array) -> Array:
    """Return Σ_{j<l≤slot} log_forget_l for every key j [B H S]."""
    keys = jnp.arange(log_forget.shape[1])
    gates = jnp.where((keys <= slot[:, None])[..., None], log_forget, 0.0)
    after = jnp.pad(gates[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.moveaxis(lax.cumsum(after, axis=1, reverse=True), 1, 2)
