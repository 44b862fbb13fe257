"""Linear and squared attention as quadratic formulas in float64, and inputs for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.ops.linear_attention import LinearState
from jaxmem.ops.squared_attention import feature_count, squared_features

# Padding before, between, inside and after documents; the state belongs to document 4.
IDS = np.array([0, 4, 4, 0, 7, 7, 0, 7, 7, 2, 2, 2, 0, 0, 2, 2, 9, 0])
STATE_DOCUMENT = 4


class Operands(NamedTuple):
    """What a call takes."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    state: Any


def operands(
    power: int,
    length: int,
    *,
    heads: int = 4,
    groups: int = 2,
    width: int = 5,
    value_width: int = 3,
    batch: int = 2,
    decay: bool = True,
    with_total: bool = True,
) -> Operands:
    """Draw operands with a state."""
    draw = np.random.default_rng(length + 100 * power)
    features = width if power == 1 else feature_count(width)
    total = draw.normal(size=(batch, heads, features)) if with_total else None
    return Operands(
        draw.normal(size=(batch, length, groups, width)),
        draw.normal(size=(batch, length, groups, width)),
        draw.normal(size=(batch, length, heads, value_width)),
        draw.normal(size=(batch, length, heads)) - 1.0 if decay else None,
        LinearState(draw.normal(size=(batch, heads, features, value_width)), total),
    )


def formula(
    power: int,
    scale: float,
    given: Operands,
    ids: np.ndarray | None = None,
    state_document: int | None = None,
) -> tuple[Any, Any, LinearState]:
    """Return sums of values, sums of weights and the state after, by all pairs of tokens."""
    q, k, v, gates, state = given
    share = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, share, axis=2), jnp.repeat(k, share, axis=2)
    batch, length, heads, _ = v.shape
    gates = jnp.zeros((batch, length, heads)) if gates is None else gates
    real = np.ones(length, bool) if ids is None else ids != 0
    document = np.ones(length, int) if ids is None else carried(ids, state_document)
    first = document[0] if state_document is None else state_document
    gates = jnp.where(real[:, None], gates, 0.0)
    passed = jnp.cumsum(gates, axis=1)
    seen = np.tril(np.ones((length, length), bool)) & real[None, :]
    seen &= document[:, None] == document[None, :]
    weights = (scale * jnp.einsum("bthk,bshk->bhts", q, k)) ** power
    apart = jnp.moveaxis(passed, 1, 2)
    apart = apart[..., :, None] - apart[..., None, :]
    weights = weights * jnp.where(seen, jnp.exp(jnp.where(seen, apart, 0.0)), 0.0)
    y = jnp.einsum("bhts,bshv->bthv", weights, v)
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)
    asked = scale * q if power == 1 else squared_features(scale * q)
    since = jnp.exp(passed) * (document == first)[:, None]
    y = y + since[..., None] * jnp.einsum("bthf,bhfv->bthv", asked, state.memory)
    if state.total is not None:
        total = total + since * jnp.einsum("bthf,bhf->bth", asked, state.total)
    written = k if power == 1 else squared_features(k)
    until = jnp.exp(passed[:, -1:] - passed) * (real & (document == document[-1]))[:, None]
    memory = jnp.einsum("bthf,bthv->bhfv", written * until[..., None], v)
    memory = memory + since[:, -1, :, None, None] * state.memory
    sums = None
    if state.total is not None:
        sums = jnp.sum(written * until[..., None], axis=1) + since[:, -1, :, None] * state.total
    return y, total, LinearState(memory, sums)


def carried(ids: np.ndarray, before: int | None) -> np.ndarray:
    """Return each token's document, padding taking that of the last real token before it."""
    last = ids[np.flatnonzero(ids)[0]] if before is None else before
    found = []
    for each in ids:
        last = each or last
        found.append(last)
    return np.array(found)


def functional(outputs: Any) -> jax.Array:
    """Return a random functional of all outputs, so that every one has a gradient."""
    return sum(
        jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))
        for leaf in jax.tree.leaves(outputs)
    )
