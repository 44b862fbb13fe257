"""The ops in plain JAX, for float64: what a result must agree with before it is timed.

They are written for little memory, not for speed, and share nothing with the implementations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

_BLOCK = 256
"""Queries at a time, so that weights of long rows fit."""


def leaky_average(x: Array, rate: Array) -> Array:
    """h_t = exp(-rate) h_{t-1} + x_t over axis 1 of x [B T H K]."""
    decay = jnp.exp(-rate)[:, None]

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = decay * h + x
        return h, h

    _, sums = lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(sums, 0, 1)


def gated_scan(x: Array, log_decay: Array) -> Array:
    """h_t = exp(log_decay_t) h_{t-1} + x_t over axis 1 of x, log_decay [B T D]."""

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        h = inputs[0] * h + inputs[1]
        return h, h

    moved = (jnp.moveaxis(jnp.exp(log_decay), 1, 0), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(x[:, 0]), moved)[1], 0, 1)


def weighted_average(values: Array, log_weight: Array, log_decay: Array) -> Array:
    """a_t / q_t, sums of e^k v and of e^k that both decay by e^w; values [B T H V], k, w [B T H 1].

    No maximum is taken out: in float64 the weights that are drawn here do not overflow.
    """

    def step(sums: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple:
        v, weight, decay = inputs
        a, q = decay * sums[0] + weight * v, decay * sums[1] + weight
        return (a, q), a / q

    streams = (values, jnp.exp(log_weight), jnp.exp(log_decay))
    start = (jnp.zeros_like(values[:, 0]), jnp.zeros_like(log_weight[:, 0]))
    moved = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), streams)
    return jnp.moveaxis(lax.scan(step, start, moved)[1], 0, 1)


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ / √K) v, each query over the keys up to its own place."""
    places = jnp.arange(q.shape[1])

    def read(q: Array, at: Array) -> Array:
        logits = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        logits = jnp.where(places <= at[:, None], logits, -jnp.inf)
        return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits, axis=-1), v)

    return _by_block(read, q, places)


def persistent_read(q: Array, keys: Array, values: Array, scale: Array) -> Array:
    """Mean over banks of softmax(scale q keysᵀ) values."""

    def read(q: Array, at: Array) -> Array:
        del at
        logits = jnp.einsum("bthk,rhpk->rbthp", q, keys) * scale[:, None]
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("rbthp,rhpv->bthv", weights, values) / keys.shape[0]

    return _by_block(read, q, jnp.arange(q.shape[1]))


def _by_block(read: Callable[[Array, Array], Array], q: Array, places: Array) -> Array:
    """Read blocks of queries one after another, each computed again in the backward pass."""
    length = q.shape[1]
    block = min(_BLOCK, length)
    number = -(-length // block)
    fill = number * block - length
    cut = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
    cut = jnp.moveaxis(cut.reshape(q.shape[0], number, block, *q.shape[2:]), 1, 0)
    at = jnp.pad(places, (0, fill), mode="edge").reshape(number, block)
    y = lax.map(lambda x: jax.checkpoint(read)(*x), (cut, at))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], number * block, *y.shape[3:])[:, :length]
