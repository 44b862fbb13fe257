r"""Leaky average: one decaying sum per head, the short-term memory in the keys of Memory Mosaics.

h_t = λ h_{t-1} + x_t,  λ = exp(-rate) in (0, 1]

Three published scalings of it: `sum` is h_t, `scaled` is (1-λ) h_t, and `normalised` is h_t over
the same recurrence run on ones. They differ by a positive factor per head and time, so unit keys
made of them are equal.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ShapeError, unknown_name
from jaxmem.ops import leaky_average_xla as plain
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import spans
from jaxmem.shapes import HeadScalars, Queries, RowInts, SegmentIds
from pallas_kernels import leaky_average as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import interpreted
from pallas_kernels.leaky_average import Clock, LeakyAverageConfig

Scaling = Literal["sum", "scaled", "normalised"]
HeadSums = Float[Array, "B H K"]

declare("leaky_average", pallas=kernels.unmet, xla=None, reference=None)


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
    chunk_size: int | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
    config: LeakyAverageConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Queries, LeakyState]:
    r"""Average the past of each channel with weights that decay at its head's rate.

    h_t = exp(-rate) h_{t-1} + x_t
    y_t = h_t  |  (1 - exp(-rate)) h_t  |  h_t / Σ_{i≤t} exp(-rate (t-i))

    Cost per head: 2 T C K FLOPs in chunks of C tokens, 2 T K token by token. Kept for the backward
    pass: h, in the dtype of x for `sum` and in float32 for the other two. The recurrence is carried
    in float32 or wider.

    Args:
      x: inputs, any T >= 1.
      rate: decay rate per token and head, >= 0 (see `decay_rate`).
      scaling: which of the three published forms to return.
      initial_state: sums carried over from earlier tokens; None is zero.
      segment_ids: document of each token; the sum starts anew with each document, and a padded
        token (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      chunk_size: tokens per chunk of the XLA form, speed only, never the result; None: token by
        token on a CPU, where that is fastest, 64 elsewhere.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` works in chunks with
        the true gradient of the rate, `pallas` does so in one pass over memory.
      precision: of the products within chunks; None and `high`: about float32, also for half
        precision inputs; `default`: one product in TF32 or the dtype of x, with a relative error of
        the weights up to 2^-11 in float32 and float16, 2^-9 in bfloat16; `highest`: float32.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      y in the dtype of x, and the state after the last token.

    Raises:
      ShapeError: x has no token, x and rate disagree about the number of heads, or the state
        about the scaling.
      UnknownName: no such scaling or implementation.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Memory Mosaics (arXiv 2405.06394), eq. 7; nanoMosaics `LeakyAvg` (`sum`), the
      Library's regular form (`scaled`) and its CUDA operator (`normalised`). Differs: the CUDA
      operator returns a decay gradient of wrong magnitude and, for negative parameters, wrong
      sign; this is the true one.
    """
    _check(x, rate, scaling)
    form = resolve("leaky_average", implementation, x, rate, config=config)
    wide = at_least_float32(x).dtype
    rate = rate.astype(wide)
    batch, _, heads, width = x.shape
    if initial_state is None:
        initial_state = init_leaky_state(batch, heads, width, scaling=scaling, dtype=wide)
    if scaling == "normalised" and initial_state.weight is None:
        raise ShapeError(
            "leaky_average: the initial state has no weight, which `normalised` carries on. "
            "Make it with init_leaky_state(..., scaling='normalised')."
        )
    clock = None if segment_ids is None else _clock(segment_ids, initial_segment)
    static = _Static(
        form,
        chunk_size,
        precision or "high",
        config,
        interpreted(interpret),
        x.dtype,
        x.dtype if scaling == "sum" else wide,
    )
    sums, total = _run(static, x, rate, initial_state.total.astype(wide), clock)
    y, weight = sums, initial_state.weight
    if scaling == "scaled":
        y = sums * -jnp.expm1(-rate)[:, None]
    elif weight is not None:
        ones = jnp.ones((*x.shape[:3], 1), wide)
        # One channel is too narrow for a kernel.
        static = static._replace(form="reference" if form == "reference" else "xla", x_dtype=wide)
        weights, weight = _run(static, ones, rate, weight.astype(wide), clock)
        # A row that has only seen padding has no weight yet; its outputs are masked below.
        y = sums / jnp.where(weights == 0, 1.0, weights)
    if clock is not None:
        y = jnp.where(clock.valid[:, :, None, None], y, 0.0)
    return y.astype(x.dtype), LeakyState(total, weight)


def _check(x: Array, rate: Array, scaling: str) -> None:
    if scaling not in ("sum", "scaled", "normalised"):
        raise unknown_name("scaling", scaling, ("sum", "scaled", "normalised"))
    if rate.shape != x.shape[2:3]:
        raise ShapeError(
            f"leaky_average: rate has shape {rate.shape}, x has {x.shape}. "
            f"Pass one rate per head, shape ({x.shape[2]},)."
        )
    if 0 in x.shape:
        raise ShapeError(
            f"leaky_average: an axis of x {x.shape} is empty. Give at least one token."
        )


def _clock(segment_ids: SegmentIds, initial_segment: RowInts | None) -> Clock:
    rows = spans(segment_ids, initial_segment)
    return Clock(rows.rank, jnp.cumsum(rows.reset, axis=1), rows.valid)


class _Static(NamedTuple):
    """What a call does not trace."""

    form: str
    chunk: int | None
    precision: Precision
    config: LeakyAverageConfig | None
    interpret: bool
    x_dtype: jnp.dtype
    sums_dtype: jnp.dtype


def _run(
    static: _Static, x: Array, rate: Array, start: Array, clock: Clock | None
) -> tuple[Array, Array]:
    """Return all sums, standing still at padding, and the last of them, float32 or wider."""
    if static.form == "reference":
        sums = _reference(x.astype(rate.dtype), rate, start, clock)
        return sums, sums[:, -1]
    return _sums(static, x, rate, start, clock)


def _reference(x: Array, rate: Array, start: Array, clock: Clock | None) -> Array:
    """Run the recurrence one token at a time: the definition, and the decode step."""
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

    _, sums = lax.scan(step, start, (factor, jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(sums, 0, 1)


class _Residuals(NamedTuple):
    """Enough for every backward pass, whichever implementation ran forward."""

    sums: Array  # [B T H K]
    rate: Array  # [H]
    start: Array  # [B H K]
    clock: Clock | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    static: _Static, x: Array, rate: Array, start: Array, clock: Clock | None
) -> tuple[Array, Array]:
    return _sums_forward(static, x, rate, start, clock)[0]


def _sums_forward(
    static: _Static, x: Array, rate: Array, start: Array, clock: Clock | None
) -> tuple[tuple[Array, Array], _Residuals]:
    if static.form == "pallas":
        kernel = functools.partial(
            kernels.leaky_sums_forward, out_dtype=static.sums_dtype, **_launch_options(static)
        )
        sums, final = first_order("leaky_average", kernel)(x, rate, start, clock)
    else:
        sums, final = plain.forward(
            x.astype(rate.dtype),
            rate,
            start,
            clock,
            chunk=static.chunk,
            precision=static.precision,
        )
        sums = sums.astype(static.sums_dtype)
    return (sums, final), _Residuals(sums, rate, start, clock)


def _sums_backward(static: _Static, residuals: _Residuals, cotangents: tuple) -> tuple:
    """Add <dstart, start> to the products of a decaying first token; drate = -Σ products."""
    sums, rate, start, clock = residuals
    g, g_final = cotangents
    if static.form == "pallas":
        kernel = functools.partial(
            kernels.leaky_sums_backward, x_dtype=static.x_dtype, **_launch_options(static)
        )
        dx, products, dstart = first_order("leaky_average", kernel)(g, g_final, sums, rate, clock)
    else:
        dx, products, dstart = plain.backward(
            g.astype(rate.dtype),
            g_final,
            sums.astype(rate.dtype),
            rate,
            clock,
            chunk=static.chunk,
            precision=static.precision,
        )
    first = jnp.sum(dstart * start, axis=2)
    if clock is not None:
        # After leading padding the first decay comes later, and is among the products.
        first = jnp.where(clock.valid[:, :1], first, 0.0)
    return dx.astype(static.x_dtype), -(products + jnp.sum(first, axis=0)), dstart, None


_sums.defvjp(_sums_forward, _sums_backward)


def _launch_options(static: _Static) -> dict[str, Any]:
    return {
        "config": static.config,
        "precision": static.precision,
        "interpret": static.interpret,
    }
