"""The leaky average as plain JAX: a token at a time, or chunks as matrix products.

h_t = a_t h_{t-1} + x_t and, backwards, s_t = g_t + a_{t+1} s_{t+1}, where a_t is λ = exp(-rate) for
a token that continues its document, 1 at padding (whose input is 0) and 0 at a reset.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision
from pallas_kernels._interpret import on_cpu
from pallas_kernels.leaky_average import Clock

_CHUNK = 64
"""Tokens per chunk where products are faster than steps (GPU, TPU)."""


class Gradients(NamedTuple):
    """What the backward pass returns, float32 or wider."""

    x: Array
    products: Array
    """Σ_{t>1} a_t <s_t, h_{t-1}> [H] over the tokens whose decay depends on the rate."""
    start: Array


def forward(
    x: Array,
    rate: Array,
    start: Array,
    clock: Clock | None,
    *,
    chunk: int | None,
    precision: Precision,
) -> tuple[Array, Array]:
    """Return all sums and the last ones; `chunk` None chooses what is fastest on this platform.

    A step per token is the fastest form on a CPU, where a scan is a plain loop. On a GPU every step
    of a scan is a launch, so chunks are multiplied with a triangular matrix of decays.
    """
    x = _silent(x, clock)
    if chunk is None and on_cpu():
        return _steps_forward(x, rate, start, clock)
    tiles = _cut(x, rate, clock, chunk, precision)
    sums = _joined(_carry_forward(tiles, start), x.shape[1])
    return sums, sums[:, -1]


def backward(
    g: Array,
    g_final: Array,
    sums: Array,
    rate: Array,
    clock: Clock | None,
    *,
    chunk: int | None,
    precision: Precision,
) -> Gradients:
    """Run the adjoint recurrence from the cotangent of the last sums."""
    if chunk is None and on_cpu():
        gradients = _steps_backward(g, g_final, sums, rate, clock)
    else:
        last = jnp.arange(g.shape[1]) == g.shape[1] - 1
        g = g + jnp.where(last[:, None, None], g_final[:, None], 0.0)
        gradients = _chunks_backward(g, sums, rate, clock, chunk, precision)
    return gradients._replace(x=_silent(gradients.x, clock))


def _silent(x: Array, clock: Clock | None) -> Array:
    return x if clock is None else jnp.where(clock.valid[:, :, None, None], x, 0.0)


class _Kinds(NamedTuple):
    """What each token does to the sum, [B T] bool."""

    ticking: Array
    """It is real, so a decay is due."""
    continuing: Array
    """It is no reset."""


def _kinds(clock: Clock) -> _Kinds:
    zero = jnp.zeros_like(clock.ticks[:, :1])
    ticking = jnp.diff(clock.ticks, axis=1, prepend=zero) > 0
    return _Kinds(ticking, jnp.diff(clock.epoch, axis=1, prepend=zero) == 0)


def _factor(decay: Array, ticking: Array, continuing: Array) -> Array:
    """Return a [B H 1] of one token."""
    factor = jnp.where(ticking[:, None], decay, 1.0) * continuing[:, None]
    return factor[:, :, None]


def _steps_forward(x: Array, rate: Array, start: Array, clock: Clock | None) -> tuple[Array, Array]:
    decay = jnp.exp(-rate)

    def step(h: Array, inputs: tuple[Array, _Kinds | None]) -> tuple[Array, Array]:
        x_t, kinds = inputs
        a = decay[:, None] if kinds is None else _factor(decay, *kinds)
        h = a * h + x_t
        return h, h

    final, sums = lax.scan(step, start, (jnp.moveaxis(x, 1, 0), _by_time(clock)))
    return jnp.moveaxis(sums, 0, 1), final


def _steps_backward(
    g: Array, g_final: Array, sums: Array, rate: Array, clock: Clock | None
) -> Gradients:
    """Walk back in time with r_t = a_{t+1} s_{t+1} and the products r_t h_t added up on the way.

    The products are not made of h_t - x_t, which would cancel for large rates.
    """
    decay = jnp.exp(-rate)
    zero = jnp.zeros_like(g[:, 0])

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        r, products, counted = carry
        g_t, h_t, kinds = inputs
        products += counted * r * h_t
        s = r + g_t
        if kinds is None:
            return (decay[:, None] * s, products, jnp.ones_like(counted)), s
        a = _factor(decay, *kinds)
        return (a * s, products, kinds.ticking[:, None, None].astype(s.dtype)), s

    # What the last sums hand on has not decayed.
    counted = jnp.zeros((1 if clock is None else g.shape[0], 1, 1), g.dtype)
    inputs = (jnp.moveaxis(g, 1, 0), jnp.moveaxis(sums, 1, 0), _by_time(clock))
    carry, adjoint = lax.scan(step, (g_final, zero, counted), inputs, reverse=True)
    return Gradients(jnp.moveaxis(adjoint, 0, 1), jnp.sum(carry[1], axis=(0, 2)), carry[0])


def _by_time(clock: Clock | None) -> _Kinds | None:
    return None if clock is None else _Kinds(*(kind.T for kind in _kinds(clock)))


def _chunks_backward(
    g: Array,
    sums: Array,
    rate: Array,
    clock: Clock | None,
    chunk: int | None,
    precision: Precision,
) -> Gradients:
    tiles = _cut(g, rate, clock, chunk, precision)
    adjoint = _joined(_carry_backward(tiles), g.shape[1])
    decay = jnp.exp(-rate)
    if clock is None:
        products = jnp.einsum("bthk,bthk->h", adjoint[:, 1:], sums[:, :-1], precision="highest")
        return Gradients(adjoint, decay * products, decay[:, None] * adjoint[:, 0])
    kinds = _kinds(clock)
    decaying = (kinds.ticking & kinds.continuing)[:, 1:].astype(g.dtype)
    products = jnp.einsum(
        "bthk,bthk,bt->h", adjoint[:, 1:], sums[:, :-1], decaying, precision="highest"
    )
    first = _factor(decay, *(kind[:, 0] for kind in kinds))
    return Gradients(adjoint, decay * products, first * adjoint[:, 0])


class _Tiles(NamedTuple):
    """A row cut into N chunks of C tokens, and the decays within and into each."""

    x: Array  # [B N C H K]
    matrix: Array  # [B|1 N|1 C C H]: from token j to token i of a chunk, 0 above the diagonal
    entering: Array  # [B|1 N|1 C H]: from the last token of the chunk before to token i
    precision: lax.Precision


def _cut(
    x: Array, rate: Array, clock: Clock | None, chunk: int | None, precision: Precision
) -> _Tiles:
    """Prepare sums within chunks, which a triangular matrix of relative decays gives.

    Only differences of time enter an exponent, so nothing overflows however large the rate is.
    """
    batch, length, heads, width = x.shape
    chunk = min(chunk or _CHUNK, length)
    tail = -length % chunk
    number = (length + tail) // chunk
    x = jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0)))
    if clock is None:
        ticks = jnp.arange(1, chunk + 1)[None, None]
        epoch = jnp.zeros_like(ticks)
        tick_before, epoch_before = jnp.zeros_like(ticks[..., 0]), jnp.zeros_like(ticks[..., 0])
    else:
        # Padding at the end repeats the last tick and epoch: the sum stands still there.
        ticks, epoch = (
            jnp.pad(a, ((0, 0), (0, tail)), mode="edge").reshape(batch, number, chunk)
            for a in (clock.ticks, clock.epoch)
        )
        tick_before, epoch_before = (
            jnp.pad(a[:, :-1, -1], ((0, 0), (1, 0))) for a in (ticks, epoch)
        )
    inside = _decays(ticks[..., :, None] - ticks[..., None, :], rate)
    same = epoch[..., :, None] == epoch[..., None, :]
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    entering = _decays(ticks - tick_before[..., None], rate)
    return _Tiles(
        x.reshape(batch, number, chunk, heads, width),
        jnp.where((same & lower)[..., None], inside, 0.0),
        jnp.where((epoch == epoch_before[..., None])[..., None], entering, 0.0),
        lax.Precision.DEFAULT if precision == "default" else lax.Precision.HIGHEST,
    )


def _joined(x: Array, length: int) -> Array:
    """Put chunks [B N C H K] back into a row."""
    batch, _, _, heads, width = x.shape
    return x.reshape(batch, -1, heads, width)[:, :length]


def _decays(ticks: Array, rate: Array) -> Array:
    return jnp.exp(-jnp.maximum(ticks, 0)[..., None].astype(rate.dtype) * rate)


def _carry_forward(tiles: _Tiles, start: Array) -> Array:
    inside = _within(tiles.matrix, tiles)
    batch, number = tiles.x.shape[:2]
    entering = tiles.entering[..., None]
    if number == 1:
        return inside + entering * start[:, None, None]
    leaving = jnp.broadcast_to(entering[:, :, -1], (batch, number, *entering.shape[3:]))

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, end = inputs
        return factor * h + end, h

    ends = (jnp.moveaxis(leaving, 1, 0), jnp.moveaxis(inside[:, :, -1], 1, 0))
    _, carried = lax.scan(step, start, ends)
    return inside + entering * jnp.moveaxis(carried, 0, 1)[:, :, None]


def _carry_backward(tiles: _Tiles) -> Array:
    inside = _within(jnp.swapaxes(tiles.matrix, 2, 3), tiles)
    if tiles.x.shape[1] == 1:
        return inside
    # What chunk n hands to the last token of chunk n-1: its cotangents, decayed over the entry.
    entering = jnp.broadcast_to(tiles.entering, tiles.x.shape[:4])
    handed = jnp.einsum("bnih,bnihk->bnhk", entering, tiles.x, precision=tiles.precision)
    leaving = entering[:, :, -1, :, None]

    def step(s: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, hand = inputs
        return factor * s + hand, s

    ends = (jnp.moveaxis(leaving, 1, 0), jnp.moveaxis(handed, 1, 0))
    _, carried = lax.scan(step, jnp.zeros_like(handed[:, 0]), ends, reverse=True)
    to_last = tiles.matrix[:, :, -1, :, :, None]  # from each token of the chunk to its last one
    return inside + to_last * jnp.moveaxis(carried, 0, 1)[:, :, None]


def _within(matrix: Array, tiles: _Tiles) -> Array:
    """Multiply each chunk with its matrix, or with the one they share."""
    if matrix.shape[:2] == (1, 1):
        return jnp.einsum("ijh,bnjhk->bnihk", matrix[0, 0], tiles.x, precision=tiles.precision)
    return jnp.einsum("bnijh,bnjhk->bnihk", matrix, tiles.x, precision=tiles.precision)
