"""Linear attention token by token: the definition, and the decode step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.linear_terms import LinearState, Operands
from pallas_kernels._compat import vary_like

Features = Callable[[Array], Array]
"""From vectors [... K] to features [... F]."""


def run(
    operands: Operands, features: Features, scale: float
) -> tuple[Array, Array | None, LinearState]:
    """Take one step of the recurrence per token; see `linear_attention` for the formula.

    The operands have a state; the number of tokens may be symbolic.
    """
    batch, length, heads, _ = operands.v.shape

    def per_token(a: Array) -> Array:
        return jnp.moveaxis(a, 1, 0)

    def per_head(a: Array) -> Array:
        return per_token(jnp.repeat(a.astype(operands.wide), operands.heads_per_group, axis=2))

    gates = operands.log_decay
    gates = jnp.zeros((batch, length, heads), operands.wide) if gates is None else gates
    documents = operands.document
    documents = jnp.zeros((batch, length), jnp.int32) if documents is None else documents

    def step(carry: tuple[LinearState, Array], inputs: tuple[Array, ...]) -> tuple:
        (memory, total), before = carry
        q, k, v, gate, document = inputs  # [B H K] [B H K] [B H V] [B H] [B]
        state_decay = jnp.exp(jnp.where((document == before)[:, None], gate, -jnp.inf))
        phi_q, phi_k = features(scale * q), features(k)
        memory = _decayed(memory, state_decay) + phi_k[..., None] * v[..., None, :]
        y = jnp.einsum("bhf,bhfv->bhv", phi_q, memory)
        weight = None
        if total is not None:
            total = _decayed(total, state_decay) + phi_k
            weight = jnp.einsum("bhf,bhf->bh", phi_q, total)
        return (LinearState(memory, total), document), (y, weight)

    v = per_token(operands.v.astype(operands.wide))
    rows = (per_head(operands.q), per_head(operands.k), v, per_token(gates), documents.T)
    first = jnp.zeros((batch,), jnp.int32)
    carry, rows = jax.tree.map(lambda a: vary_like(a, operands), ((operands.state, first), rows))
    (state, _), (y, totals) = lax.scan(step, carry, rows)
    return jnp.moveaxis(y, 0, 1), None if totals is None else jnp.moveaxis(totals, 0, 1), state


def _decayed(sums: Array, state_decay: Array) -> Array:
    """Multiply sums by a factor per head, dropping those of another document whatever they hold."""
    factor = jnp.expand_dims(state_decay, tuple(range(2, sums.ndim)))
    return jnp.where(factor == 0.0, 0.0, factor * sums)
