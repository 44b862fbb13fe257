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


def linear_attention(q: Array, k: Array, v: Array, log_decay: Array | float = 0.0) -> Array:
    """q_tᵀ S_t / √K, S_t = e^{g_t} S_{t-1} + k_t v_tᵀ; q, k [B T G K], g [B T H], [H] or 0."""
    share, length = v.shape[2] // q.shape[2], q.shape[1]
    gates = jnp.broadcast_to(jnp.asarray(log_decay, v.dtype), v.shape[:3])

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, gate = inputs
        k, q = jnp.repeat(k, share, axis=1), jnp.repeat(q, share, axis=1)
        state = jnp.exp(gate)[..., None, None] * state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    @jax.checkpoint
    def block(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        return lax.scan(step, state, inputs)

    size = min(_BLOCK, length)

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, -length % size), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a, 1, 0).reshape(-1, size, a.shape[0], *a.shape[2:])

    start = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), v.dtype)
    y = lax.scan(block, start, tuple(cut(a) for a in (q * q.shape[3] ** -0.5, k, v, gates)))[1]
    return jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1)[:, :length]


def squared_attention(q: Array, k: Array, v: Array, log_decay: Array) -> Array:
    """Mean of the values so far with weights (q_i·k_j)² e^{g_{j+1} + ... + g_i}, g [B T H]."""
    return _similar(jnp.square, q, k, v, log_decay=log_decay, normalised=True)


def forgetting_attention(q: Array, k: Array, v: Array, log_forget: Array) -> Array:
    """Mean of the values so far with weights e^{q_i·k_j / √K + g_{j+1} + ... + g_i}, g [B T H]."""
    return _similar(jnp.exp, q, k, v, log_decay=log_forget, normalised=True)


def gated_softmax(q: Array, k: Array, v: Array, value_gate: Array) -> Array:
    """Σ_j e^{min(q_i·k_j / √K, 5)} gate_j v_j, divided by the number of tokens so far."""

    def clamped(s: Array) -> Array:
        return jnp.exp(jnp.where(s > 5.0, 5.0, s))

    y = _similar(clamped, q, k, v * value_gate[..., None], normalised=False)
    return y / jnp.arange(1, q.shape[1] + 1)[:, None, None]


def taylor_attention(q: Array, k: Array, v: Array) -> Array:
    """Mean of the values so far with weights Σ_{n<80} s^n / n!, s = q_i·k_j / √K."""

    def taylor(s: Array) -> Array:
        total = jnp.ones_like(s)
        for n in range(79, 0, -1):
            total = 1.0 + total * s / n
        return total

    return _similar(taylor, q, k, v, normalised=True)


def _similar(
    similarity: Callable[[Array], Array],
    q: Array,
    k: Array,
    v: Array,
    *,
    normalised: bool,
    log_decay: Array | None = None,
) -> Array:
    """Σ_{j≤i} w_ij v_j, w_ij = similarity(q_i·k_j / √K) e^{g_{j+1} + ... + g_i}."""
    places = jnp.arange(q.shape[1])
    passed = None if log_decay is None else jnp.cumsum(log_decay, axis=1)

    def read(q: Array, at: Array) -> Array:
        seen = places <= at[:, None]
        products = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        weights = similarity(jnp.where(seen, products, 0.0))
        if passed is not None:
            apart = passed[:, at, None] - passed[:, None]  # [B t S H]
            weights *= jnp.exp(jnp.where(seen, jnp.moveaxis(apart, 3, 1), -jnp.inf))
        weights = jnp.where(seen, weights, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True) if normalised else 1.0
        return jnp.einsum("bhts,bshv->bthv", weights / total, v)

    return _by_block(read, q, places)


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
