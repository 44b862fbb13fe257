r"""Leaky average: one decaying sum per head, the short-term memory in the keys of Memory Mosaics.

h_t = λ h_{t-1} + x_t,  λ = exp(-rate) in (0, 1]

Three published scalings of it: `sum` is h_t, `scaled` is (1-λ) h_t, and `normalised` is h_t over
the same recurrence run on ones. They differ by a positive factor per head and time, so unit keys
made of them are equal.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ShapeError, unknown_name
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import spans
from jaxmem.shapes import HeadScalars, Queries, RowInts, SegmentIds

Scaling = Literal["sum", "scaled", "normalised"]
HeadSums = Float[Array, "B H K"]

declare("leaky_average", "xla", "reference")


class LeakyState(NamedTuple):
    """What a leaky average carries from token to token, float32 or wider."""

    total: HeadSums
    """The un-normalised sum h."""
    weight: Float[Array, "B H 1"] | None
    """The same sum of ones; None unless the scaling is `normalised`."""


def decay_rate(beta: HeadScalars) -> HeadScalars:
    """Return the rate |10 beta| of the stored parameter, with gradient 10 sign(beta), 0 at 0.

    `jnp.abs` has gradient 1 at 0, which would give a large wrong gradient there.
    Reference: Memory Mosaics `LeakyAvg`, `exp_param_scale` = 10.
    """
    return 10.0 * beta * lax.stop_gradient(jnp.sign(beta))


def init_leaky_state(
    batch: int, heads: int, width: int, *, scaling: Scaling = "sum", dtype: DTypeLike = jnp.float32
) -> LeakyState:
    """Return the state before any token."""
    weight = jnp.zeros((batch, heads, 1), dtype) if scaling == "normalised" else None
    return LeakyState(jnp.zeros((batch, heads, width), dtype), weight)


def leaky_average(
    x: Queries,
    rate: HeadScalars,
    *,
    scaling: Scaling = "sum",
    initial_state: LeakyState | None = None,
    segment_ids: SegmentIds | None = None,
    initial_segment: RowInts | None = None,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Queries, LeakyState]:
    r"""Average the past of each channel with weights that decay at its head's rate.

    h_t = exp(-rate) h_{t-1} + x_t
    y_t = h_t  |  (1 - exp(-rate)) h_t  |  h_t / Σ_{i≤t} exp(-rate (t-i))

    Cost of the XLA form: O(T C K) FLOPs per head in matrix products; h is kept for the backward
    pass.

    Args:
      x: inputs, any T >= 1.
      rate: decay rate per token and head, >= 0 (see `decay_rate`).
      scaling: which of the three published forms to return.
      initial_state: sums carried over from earlier tokens; None is zero.
      segment_ids: document of each token; the sum starts anew with each document, and a padded
        token (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      chunk_size: tokens per chunk of the XLA form; speed only, never the result.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` works in chunks with
        the true gradient of the rate.

    Returns:
      y in the dtype of x, and the state after the last token.

    Raises:
      ShapeError: x and rate disagree about the number of heads, or the state about the scaling.
      UnknownName: no such scaling or implementation.
      KernelUnsupported: the named implementation does not exist.

    Reference: Memory Mosaics (arXiv 2405.06394), eq. 7; nanoMosaics `LeakyAvg` (`sum`), the
      Library's regular form (`scaled`) and its CUDA operator (`normalised`). Differs: the CUDA
      operator returns a decay gradient of wrong magnitude and, for negative parameters, wrong
      sign; this is the true one.
    """
    if scaling not in ("sum", "scaled", "normalised"):
        raise unknown_name("scaling", scaling, ("sum", "scaled", "normalised"))
    if rate.shape != x.shape[2:3]:
        raise ShapeError(
            f"leaky_average: rate has shape {rate.shape}, x has {x.shape}. "
            f"Pass one rate per head, shape ({x.shape[2]},)."
        )
    wide = at_least_float32(x)
    rate = rate.astype(wide.dtype)
    batch, _, heads, width = x.shape
    if initial_state is None:
        initial_state = init_leaky_state(batch, heads, width, scaling=scaling, dtype=wide.dtype)
    clock = None if segment_ids is None else _clock(segment_ids, initial_segment)
    run = _scan_sum if resolve("leaky_average", implementation) == "reference" else _chunked_sum
    sums = run(wide, rate, initial_state.total, clock, chunk_size)
    weight = initial_state.weight
    if scaling == "sum":
        y = sums
    elif scaling == "scaled":
        y = sums * -jnp.expm1(-rate)[:, None]
    elif weight is None:
        raise ShapeError(
            "leaky_average: the initial state has no weight, which `normalised` carries on. "
            "Make it with init_leaky_state(..., scaling='normalised')."
        )
    else:
        ones = jnp.ones((*wide.shape[:3], 1), wide.dtype)
        weights = run(ones, rate, weight, clock, chunk_size)
        weight = weights[:, -1]
        # A row that has only seen padding has no weight yet; its outputs are masked below.
        y = sums / jnp.where(weights == 0, 1.0, weights)
    if clock is not None:
        y = jnp.where(clock.valid[:, :, None, None], y, 0.0)
    return y.astype(x.dtype), LeakyState(sums[:, -1], weight)


class _Clock(NamedTuple):
    """Time as the recurrence sees it: still at padding, and the sum restarts at a reset."""

    valid: Array  # [B T] bool
    ticks: Array  # [B T] int: real tokens up to and including t
    epoch: Array  # [B T] int: resets up to and including t


def _clock(segment_ids: SegmentIds, initial_segment: RowInts | None) -> _Clock:
    rows = spans(segment_ids, initial_segment)
    return _Clock(rows.valid, rows.rank, jnp.cumsum(rows.reset, axis=1))


def _scan_sum(x: Array, rate: Array, start: Array, clock: _Clock | None, chunk_size: int) -> Array:
    """Run the recurrence one token at a time: the definition, and the decode step."""
    del chunk_size
    decay = jnp.exp(-rate)[:, None]
    if clock is None:
        factor = jnp.broadcast_to(decay, (x.shape[1], *decay.shape))
    else:
        first = jnp.zeros_like(clock.epoch[:, :1])
        reset = jnp.diff(clock.epoch, axis=1, prepend=first) > 0
        wide = (slice(None), slice(None), None, None)
        factor = jnp.where(reset[wide], 0.0, jnp.where(clock.valid[wide], decay, 1.0))
        factor = jnp.moveaxis(factor, 1, 0)
        x = jnp.where(clock.valid[wide], x, 0.0)

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a, x_t = inputs
        h = a * h + x_t
        return h, h

    _, sums = lax.scan(step, start.astype(x.dtype), (factor, jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(sums, 0, 1)


def _chunked_sum(x: Array, rate: Array, start: Array, clock: _Clock | None, chunk: int) -> Array:
    """Run the recurrence chunk by chunk as matrix products, on a padded number of tokens."""
    length = x.shape[1]
    chunk = min(chunk, length)
    tail = -length % chunk
    if tail:
        x = jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0)))
    if clock is None:
        ticks = epoch = None
    else:
        x = jnp.where(jnp.pad(clock.valid, ((0, 0), (0, tail)))[:, :, None, None], x, 0.0)
        # Padding at the end repeats the last tick and epoch: the sum stands still there.
        ticks = jnp.pad(clock.ticks, ((0, 0), (0, tail)), mode="edge")
        epoch = jnp.pad(clock.epoch, ((0, 0), (0, tail)), mode="edge")
    return _sums(x, rate, start.astype(x.dtype), ticks, epoch, chunk)[:, :length]


def _sums_value(
    x: Array, rate: Array, start: Array, ticks: Array | None, epoch: Array | None, chunk: int
) -> Array:
    return _walk(x, rate, start, ticks, epoch, chunk)


def _sums_forward(
    x: Array, rate: Array, start: Array, ticks: Array | None, epoch: Array | None, chunk: int
) -> tuple[Array, tuple]:
    sums = _walk(x, rate, start, ticks, epoch, chunk)
    return sums, (sums, rate, start, ticks, epoch)


def _sums_backward(chunk: int, residuals: tuple, cotangent: Array) -> tuple:
    """Run s_t = g_t + a_{t+1} s_{t+1} backwards in time; dx = s, drate = -Σ a_t <s_t, h_{t-1}>.

    a_t is λ for a token that continues its document, 1 at padding and 0 at a reset; only the first
    kind depends on the rate. h_{t-1} is used rather than h_t - x_t, which cancels for large rates.
    """
    sums, rate, start, ticks, epoch = residuals
    adjoint = _walk(cotangent, rate, jnp.zeros_like(start), ticks, epoch, chunk, reverse=True)
    before = jnp.concatenate([start[:, None], sums[:, :-1]], axis=1)
    decay = jnp.exp(-rate)
    if ticks is None:
        products = jnp.einsum("bthk,bthk->h", adjoint, before)
        return adjoint, -decay * products, decay[:, None] * adjoint[:, 0], None, None
    zero = jnp.zeros_like(ticks[:, :1])
    ticking = jnp.diff(ticks, axis=1, prepend=zero) > 0
    continuing = jnp.diff(epoch, axis=1, prepend=zero) == 0
    decaying = (ticking & continuing).astype(adjoint.dtype)
    products = jnp.einsum("bthk,bthk,bt->h", adjoint, before, decaying)
    factor = jnp.where(ticking[:, 0, None], decay, 1.0) * continuing[:, 0, None]
    dx = jnp.where(ticking[:, :, None, None], adjoint, 0.0)
    return dx, -decay * products, factor[:, :, None] * adjoint[:, 0], None, None


_sums = jax.custom_vjp(_sums_value, nondiff_argnums=(5,))
_sums.defvjp(_sums_forward, _sums_backward)


def _walk(
    x: Array,
    rate: Array,
    start: Array,
    ticks: Array | None,
    epoch: Array | None,
    chunk: int,
    *,
    reverse: bool = False,
) -> Array:
    """Sum within chunks by a triangular matrix of relative decays, and carry between chunks.

    Only differences of time enter an exponent, so nothing overflows however large the rate is.
    """
    batch, length, heads, width = x.shape
    number = length // chunk
    split = (batch, number, chunk)
    if ticks is None or epoch is None:
        ticks = jnp.broadcast_to(jnp.arange(1, chunk + 1), (1, number, chunk))[:, :1]
        epoch = jnp.zeros_like(ticks)
        tick_before, epoch_before = jnp.zeros_like(ticks[..., 0]), jnp.zeros_like(ticks[..., 0])
    else:
        ticks, epoch = ticks.reshape(split), epoch.reshape(split)
        tick_before = jnp.pad(ticks[:, :-1, -1], ((0, 0), (1, 0)))
        epoch_before = jnp.pad(epoch[:, :-1, -1], ((0, 0), (1, 0)))
    inside = _decays(ticks[..., :, None] - ticks[..., None, :], rate)
    same = epoch[..., :, None] == epoch[..., None, :]
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    matrix = jnp.where((same & lower)[..., None], inside, 0.0)
    entering = _decays(ticks - tick_before[..., None], rate)
    entering = jnp.where((epoch == epoch_before[..., None])[..., None], entering, 0.0)
    x = x.reshape(*split, heads, width)
    if reverse:
        return _carry_backward(x, matrix, entering).reshape(batch, length, heads, width)
    return _carry_forward(x, matrix, entering, start).reshape(batch, length, heads, width)


def _decays(ticks: Array, rate: Array) -> Array:
    return jnp.exp(-jnp.maximum(ticks, 0)[..., None].astype(rate.dtype) * rate)


def _carry_forward(x: Array, matrix: Array, entering: Array, start: Array) -> Array:
    inside = _within(matrix, x)
    if x.shape[1] == 1:
        return inside + entering[..., None] * start[:, None, None]
    number = x.shape[1]
    leaving = jnp.broadcast_to(entering[:, :, -1], (x.shape[0], number, entering.shape[-1]))

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, end = inputs
        return factor[..., None] * h + end, h

    _, carried = lax.scan(
        step, start, (jnp.moveaxis(leaving, 1, 0), jnp.moveaxis(inside[:, :, -1], 1, 0))
    )
    return inside + entering[..., None] * jnp.moveaxis(carried, 0, 1)[:, :, None]


def _carry_backward(g: Array, matrix: Array, entering: Array) -> Array:
    transposed = jnp.swapaxes(matrix, 2, 3)
    inside = _within(transposed, g)
    if g.shape[1] == 1:
        return inside
    number = g.shape[1]
    # What chunk n hands to the last token of chunk n-1: its cotangents, decayed over the entry.
    handed = jnp.einsum("bnih,bnihk->bnhk", jnp.broadcast_to(entering, (*g.shape[:4],)), g)
    leaving = jnp.broadcast_to(entering[:, :, -1], (g.shape[0], number, entering.shape[-1]))

    def step(s: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, hand = inputs
        return factor[..., None] * s + hand, s

    _, carried = lax.scan(
        step,
        jnp.zeros_like(handed[:, 0]),
        (jnp.moveaxis(leaving, 1, 0), jnp.moveaxis(handed, 1, 0)),
        reverse=True,
    )
    to_last = matrix[:, :, -1, :, :, None]  # decay from each token of the chunk to its last one
    return inside + to_last * jnp.moveaxis(carried, 0, 1)[:, :, None]


def _within(matrix: Array, x: Array) -> Array:
    """Multiply each chunk of x [B N C H K] with its matrix [B|1 N|1 C C H]."""
    if matrix.shape[:2] == (1, 1):
        return jnp.einsum("ijh,bnjhk->bnihk", matrix[0, 0], x)
    return jnp.einsum("bnijh,bnjhk->bnihk", matrix, x)
