"""Linear attention chunk by chunk in plain JAX: a quadratic form inside, a state in between.

The carry is all that is kept for the backward pass (`jax.checkpoint`); on a CPU this is the fastest
form forward and backward (kernels are for GPUs). Squared attention is the same walk with squared
weights inside the chunk and the products of two channels as features between chunks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import cumulative
from jaxmem.ops.linear_reference import Features
from jaxmem.ops.linear_terms import LinearState, Operands, default_chunk
from pallas_kernels._compat import Precision, vary_like


class Walk(NamedTuple):
    """The static part of a call."""

    power: int
    """The power of q·k that a weight is."""
    features: Features
    """φ with φ(q)·φ(k) = (q·k)^power."""
    scale: float
    chunk_size: int | None
    """None: the one of the platform."""
    precision: Precision | None


class _Chunk(NamedTuple):
    """Tokens of one chunk; groups of heads share queries and keys."""

    q: Array
    """[B G C K]"""
    k: Array
    """[B G C K]"""
    v: Array
    """[B H C V]"""
    passed: tuple[Array, Array] | None
    """Sums of the log decays since the chunk began, in two words that add up to them [B H C]."""
    document: Array | None
    """[B C]"""


class _Carry(NamedTuple):
    """What goes from one chunk to the next."""

    memory: Array
    """[B H F V]"""
    total: Array | None
    """[B H F]"""
    document: Array
    """Document of the last token [B]."""


def run(operands: Operands, walk: Walk) -> tuple[Array, Array | None, LinearState]:
    """Walk over the chunks; see `linear_attention` and `squared_attention` for the formulas.

    The operands have a state; the number of tokens may be symbolic.
    """
    length = operands.q.shape[1]
    size = walk.chunk_size or default_chunk()
    if isinstance(length, int):
        size = max(1, min(size, length))
    chunks = _cut(operands, size)
    start: Any = operands.state
    document = jnp.zeros((operands.q.shape[0],), jnp.int32)
    carry = _Carry(start.memory, start.total, document)
    carry, chunks = jax.tree.map(lambda a: vary_like(a, operands), (carry, chunks))
    body = jax.checkpoint(functools.partial(_chunk, walk))
    carry, (y, total) = lax.scan(body, carry, chunks)
    total = None if total is None else _joined(total)[:, :length]
    return _joined(y)[:, :length], total, LinearState(carry.memory, carry.total)


def _joined(chunks: Array) -> Array:
    """Merge [N B H C ...] into [B T H ...]."""
    tokens = jnp.moveaxis(chunks, (0, 3), (1, 2))
    batch, count, size, *rest = tokens.shape
    return tokens.reshape(batch, count * size, *rest)


def _cut(operands: Operands, size: int) -> _Chunk:
    """Cut rows into chunks along a new first axis, the ragged last one filled with padding."""
    batch, length = operands.q.shape[:2]
    count = -(-length // size)
    fill = count * size - length

    def chunks(a: Array) -> Array:  # [B T H ...] to [N B H C ...]
        a = jnp.pad(a.astype(operands.wide), ((0, 0), (0, fill), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(batch, count, size, *a.shape[2:]), (1, 3), (0, 2))

    document = operands.document
    if document is not None:
        document = jnp.pad(document, ((0, 0), (0, fill)), mode="edge")
        document = jnp.moveaxis(document.reshape(batch, count, size), 1, 0)
    passed = None
    if operands.log_decay is not None:
        passed = _sums(chunks(operands.log_decay))
    return _Chunk(chunks(operands.q), chunks(operands.k), chunks(operands.v), passed, document)


def _sums(gates: Array) -> tuple[Array, Array]:
    """Sum gates [N B H C] over each chunk, so that a strong one leaves weak ones their digits."""
    words = jax.vmap(cumulative)(jnp.moveaxis(gates, -1, 2))  # over [B C H]
    coarse, rest = (jnp.moveaxis(word, 2, -1) for word in words)
    # The derivative of both is that of their sum, and the first one carries it.
    return coarse, lax.stop_gradient(rest)


def _chunk(walk: Walk, carry: _Carry, chunk: _Chunk) -> tuple[_Carry, tuple[Array, Array | None]]:
    """Read and write one chunk."""
    product = functools.partial(jnp.einsum, precision=walk.precision)
    heads_per_group = chunk.v.shape[1] // chunk.q.shape[1]

    # A product with an axis of heads on one side only takes half again as long on a CPU.
    def per_head(a: Array) -> Array:  # [B G ...] to [B H ...]
        return jnp.repeat(a, heads_per_group, axis=1)

    q = walk.scale * chunk.q
    weights = per_head(product("bgik,bgjk->bgij", q, chunk.k) ** walk.power) * _within(chunk)
    phi_q, phi_k = per_head(walk.features(q)), per_head(walk.features(chunk.k))
    since, until, state_decay = _across(chunk, carry.document)
    y = product("bhij,bhjv->bhiv", weights, chunk.v)
    y = y + since[..., None] * product("bhif,bhfv->bhiv", phi_q, carry.memory)
    values = chunk.v * until[..., None]
    memory = state_decay[..., None, None] * carry.memory
    memory = memory + product("bhjf,bhjv->bhfv", phi_k, values)
    total = weight = None
    if carry.total is not None:
        weight = jnp.sum(weights, axis=-1)
        weight = weight + since * product("bhif,bhf->bhi", phi_q, carry.total)
        total = state_decay[..., None] * carry.total
        until = jnp.broadcast_to(until, chunk.v.shape[:3])
        total = total + product("bhjf,bhj->bhf", phi_k, until)
    last = carry.document if chunk.document is None else chunk.document[:, -1]
    return _Carry(memory, total, last), (y, weight)


def _within(chunk: _Chunk) -> Array:
    """Return the factors of the weights inside a chunk [B|1 H|1 C C]: decay, 0 if invisible."""
    size = chunk.q.shape[2]
    seen = jnp.tril(jnp.ones((size, size), bool))[None]
    if chunk.document is not None:
        seen = seen & (chunk.document[:, :, None] == chunk.document[:, None, :])
    seen = seen[:, None]
    if chunk.passed is None:
        return seen.astype(chunk.q.dtype)
    coarse, rest = (a[..., :, None] - a[..., None, :] for a in chunk.passed)
    return jnp.exp(jnp.where(seen, coarse + rest, -jnp.inf))


def _across(chunk: _Chunk, before: Array) -> tuple[Array, Array, Array]:
    """Return the factors between a chunk and the states around it, broadcastable.

    They are, from the state before to each token [B H C], from each token to the state after
    [B H C], and from the state before to the state after [B H].
    """
    since = until = jnp.zeros((1, 1, chunk.q.shape[2]), chunk.q.dtype)
    if chunk.passed is not None:
        coarse, rest = chunk.passed
        since = coarse + rest
        until = (coarse[..., -1:] - coarse) + (rest[..., -1:] - rest)
    if chunk.document is not None:
        # Masked as exponents: another document may grow beyond all floats.
        first, last = before[:, None], chunk.document[:, -1:]
        since = jnp.where((chunk.document == first)[:, None], since, -jnp.inf)
        until = jnp.where((chunk.document == last)[:, None], until, -jnp.inf)
    since, until = jnp.exp(since), jnp.exp(until)
    return since, until, since[..., -1]
