"""The leaky average as plain JAX: a token at a time, or chunks as matrix products.

h_t = a_t h_{t-1} + x_t, where a_t is λ = exp(-rate) for a token that continues its document, 1 at
padding (whose input is 0) and 0 at a reset. A tangent obeys the same recurrence,

dh_t = a_t dh_{t-1} + dx_t - drate λ h_{t-1}, the last term only where a_t = λ,

and its transpose, which JAX derives, runs the recurrence backwards in time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxmem.ops.platforms import on_cpu_or_elsewhere
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels.leaky_average import Clock

_CHUNK = 64
"""Tokens per chunk where products are faster than steps (GPU, TPU)."""


class Options(NamedTuple):
    """What a call does not trace."""

    chunk: int | None
    """Tokens per chunk; None: what is fastest where the code runs."""
    precision: Precision
    dtype: DTypeLike
    """Of the sums, which are kept for the backward pass."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def leaky_sums(
    options: Options, x: Array, rate: Array, start: Array, clock: Clock | None
) -> tuple[Array, Array]:
    """Return all sums, standing still at padding, and the last of them in the dtype of the rate.

    A step per token is the fastest form on a CPU, where a scan is a plain loop. On a GPU every step
    of a scan is a launch, so chunks are multiplied with a triangular matrix of decays.
    """
    x = _silent(x.astype(rate.dtype), clock)
    start = vary_like(start, x, rate, clock)
    sums, final = _by_platform(options, x.shape[1], _steps, _chunks, x, rate, start, clock)
    return sums.astype(options.dtype), final


@leaky_sums.defjvp
def _differentiate(options: Options, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    _, rate, start, clock = primals
    sums, final = leaky_sums(options, *primals)
    # Autodiff alone would keep the decays besides the sums, from which all follows.
    linear = jax.checkpoint(functools.partial(_tangent, options), prevent_cse=False)
    return (sums, final), linear(tangents[:3], sums, rate, start, clock)


def _tangent(
    options: Options,
    tangents: tuple[Array, Array, Array],
    sums: Array,
    rate: Array,
    start: Array,
    clock: Clock | None,
) -> tuple[Array, Array]:
    """Return the tangents of the sums, linear in those of x, rate and start.

    Products with the rate's tangent are not made of h_t - x_t, which cancels for large rates.
    """
    dx, drate, dstart = tangents
    dx = _silent(dx.astype(rate.dtype), clock)
    given = (sums.astype(rate.dtype), rate, start, clock)
    dstart = vary_like(dstart, dx, drate, *given)
    forms = (_tangent_steps, _tangent_chunks)
    dsums, dfinal = _by_platform(options, dx.shape[1], *forms, (dx, drate, dstart), *given)
    return dsums.astype(options.dtype), dfinal


def _by_platform(
    options: Options,
    length: Any,
    steps: Callable[..., Any],
    chunks: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Run chunks of the size that is asked for, or the form that is fastest where it runs."""
    if not isinstance(length, int):  # a symbolic one, which cannot be cut
        return steps(*operands)
    chunks = functools.partial(chunks, options.chunk or _CHUNK, options.precision)
    if options.chunk is None:
        return on_cpu_or_elsewhere(steps, chunks, *operands)
    return chunks(*operands)


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


def _factors(rate: Array, clock: Clock | None) -> Array:
    """Return a_t as [B T H 1], or as [1 1 H 1] where all are alike."""
    decay = jnp.exp(-rate)
    if clock is None:
        return decay[None, None, :, None]
    ticking, continuing = (kind[:, :, None, None] for kind in _kinds(clock))
    return jnp.where(ticking, decay[:, None], 1.0) * continuing


def _steps(x: Array, rate: Array, start: Array, clock: Clock | None) -> tuple[Array, Array]:
    shared, factors = _by_time(_factors(rate, clock))

    def step(h: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, Array]:
        x_t, factor = inputs
        h = (shared if factor is None else factor) * h + x_t
        return h, h

    final, sums = lax.scan(step, start, (jnp.moveaxis(x, 1, 0), factors))
    return jnp.moveaxis(sums, 0, 1), final


def _tangent_steps(
    tangents: tuple[Array, Array, Array],
    sums: Array,
    rate: Array,
    start: Array,
    clock: Clock | None,
) -> tuple[Array, Array]:
    """Carry p_t = dh_t - n_t drate h_t, where n_t = 1 if the next token decays.

    Then dh_t = a_t p_{t-1} + dx_t. The rate's tangent gets an entry per row and channel, so that
    its transpose is a running sum.
    """
    dx, drate, dstart = tangents
    shared, factors = _by_time(_factors(rate, clock))
    if clock is None:
        decays = jnp.ones_like(sums[:1, :, :1, :1])
    else:
        decays = _decaying(clock).astype(rate.dtype)
    following = jnp.concatenate([decays[:, 1:], jnp.zeros_like(decays[:, :1])], axis=1)
    slope = jnp.broadcast_to(drate[:, None], start.shape)

    def step(before: Array, inputs: tuple) -> tuple[Array, Array]:
        dx_t, h_t, factor, follows = inputs
        dh = (shared if factor is None else factor) * before + dx_t
        return dh - follows * slope * h_t, dh

    streams = (jnp.moveaxis(a, 1, 0) for a in (dx, sums))
    inputs = (*streams, factors, jnp.moveaxis(following, 1, 0))
    final, dsums = lax.scan(step, dstart - decays[:, 0] * slope * start, inputs)
    return jnp.moveaxis(dsums, 0, 1), final


def _by_time(factors: Array) -> tuple[Array, Array | None]:
    """Return what a loop closes over, and what it reads of each token: factors if they differ."""
    return factors[:, 0], None if factors.shape[1] == 1 else jnp.moveaxis(factors, 1, 0)


def _decaying(clock: Clock) -> Array:
    """Return which tokens decay by the rate, [B T 1 1]."""
    kinds = _kinds(clock)
    return (kinds.ticking & kinds.continuing)[:, :, None, None]


def _chunks(
    chunk: int,
    precision: Precision,
    x: Array,
    rate: Array,
    start: Array,
    clock: Clock | None,
) -> tuple[Array, Array]:
    tiles = _cut(x, rate, clock, chunk, precision)
    inside = _multiply_within(tiles)
    batch, number = tiles.x.shape[:2]
    entering = tiles.entering[..., None]
    leaving = jnp.broadcast_to(entering[:, :, -1], (batch, number, *entering.shape[3:]))

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, end = inputs
        return factor * h + end, h

    if number == 1:
        carried = start[:, None]
    else:
        ends = (jnp.moveaxis(leaving, 1, 0), jnp.moveaxis(inside[:, :, -1], 1, 0))
        carried = jnp.moveaxis(lax.scan(step, start, ends)[1], 0, 1)
    tokens = inside + entering * carried[:, :, None]
    sums = tokens.reshape(batch, -1, *x.shape[2:])[:, : x.shape[1]]
    return sums, sums[:, -1]


def _tangent_chunks(
    chunk: int,
    precision: Precision,
    tangents: tuple[Array, Array, Array],
    sums: Array,
    rate: Array,
    start: Array,
    clock: Clock | None,
) -> tuple[Array, Array]:
    dx, drate, dstart = tangents
    before = sums[:, :-1]
    if clock is not None:
        decaying = _decaying(clock)
        before = jnp.where(decaying[:, 1:], before, 0.0)
        start = jnp.where(decaying[:, 0], start, 0.0)
    by_rate = (drate * jnp.exp(-rate))[:, None] * before
    dx -= jnp.pad(by_rate, ((0, 0), (1, 0), (0, 0), (0, 0)))
    # What the start has lost the first token decays.
    return _chunks(chunk, precision, dx, rate, dstart - drate[:, None] * start, clock)


class _Tiles(NamedTuple):
    """A row cut into N chunks of C tokens, and the decays within and into each."""

    x: Array  # [B N C H K]
    matrix: Array  # [B|1 N|1 C C H]: from token j to token i of a chunk, 0 above the diagonal
    entering: Array  # [B|1 N|1 C H]: from the last token of the chunk before to token i
    precision: lax.Precision


def _cut(x: Array, rate: Array, clock: Clock | None, chunk: int, precision: Precision) -> _Tiles:
    """Prepare sums within chunks, which a triangular matrix of relative decays gives.

    Only differences of time enter an exponent, so nothing overflows however large the rate is.
    """
    batch, length, heads, width = x.shape
    chunk = min(chunk, length)
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


def _decays(ticks: Array, rate: Array) -> Array:
    return jnp.exp(-jnp.maximum(ticks, 0)[..., None].astype(rate.dtype) * rate)


def _multiply_within(tiles: _Tiles) -> Array:
    """Multiply each chunk with its matrix, or with the one they share."""
    if tiles.matrix.shape[:2] == (1, 1):
        matrix = tiles.matrix[0, 0]
        return jnp.einsum("ijh,bnjhk->bnihk", matrix, tiles.x, precision=tiles.precision)
    return jnp.einsum("bnijh,bnjhk->bnihk", tiles.matrix, tiles.x, precision=tiles.precision)
