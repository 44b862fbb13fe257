"""Linear attention token by token: the definition, and the decode step."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.linear_terms import LinearState, Operands

Features = Callable[[Array], Array]
"""From vectors [... K] to features [... F]."""


def run(
    operands: Operands, start: LinearState, features: Features, scale: float
) -> tuple[Array, Array | None, LinearState]:
    """Take one step of the recurrence per token; see `linear_attention` for the formula."""
    share = operands.v.shape[2] // operands.q.shape[2]
    batch, length, heads, _ = operands.v.shape

    def per_token(a: Array) -> Array:
        return jnp.moveaxis(a, 1, 0)

    def per_head(a: Array) -> Array:
        return per_token(jnp.repeat(a.astype(operands.wide), share, axis=2))

    gates = operands.log_decay
    gates = jnp.zeros((batch, length, heads), operands.wide) if gates is None else gates
    documents = operands.document
    documents = jnp.zeros((batch, length), jnp.int32) if documents is None else documents

    def step(carry: tuple[LinearState, Array], inputs: tuple[Array, ...]) -> tuple:
        (memory, total), before = carry
        q, k, v, gate, document = inputs  # [B H K] [B H K] [B H V] [B H] [B]
        kept = jnp.exp(jnp.where((document == before)[:, None], gate, -jnp.inf))
        written, asked = features(k), scale * q
        memory = _faded(memory, kept) + written[..., None] * v[..., None, :]
        y = jnp.einsum("bhf,bhfv->bhv", features(asked), memory)
        weight = None
        if total is not None:
            total = _faded(total, kept) + written
            weight = jnp.einsum("bhf,bhf->bh", features(asked), total)
        return (LinearState(memory, total), document), (y, weight)

    v = per_token(operands.v.astype(operands.wide))
    rows = (per_head(operands.q), per_head(operands.k), v, per_token(gates), documents.T)
    first = jnp.zeros((batch,), jnp.int32)
    (state, _), (y, totals) = lax.scan(step, (start, first), rows)
    return jnp.moveaxis(y, 0, 1), None if totals is None else jnp.moveaxis(totals, 0, 1), state


def _faded(sums: Array, kept: Array) -> Array:
    """Multiply sums by a factor per head, dropping those of another document whatever they hold."""
    factor = kept.reshape(*kept.shape, *(1,) * (sums.ndim - 2))
    return jnp.where(factor == 0.0, 0.0, factor * sums)
