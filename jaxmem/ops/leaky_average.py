r"""Leaky average: one decaying sum per head, the short-term memory in the keys of Memory Mosaics.

h_t = λ h_{t-1} + x_t,  λ = exp(-rate) in (0, 1]

Three published scalings of it: `sum` is h_t, `scaled` is (1-λ) h_t, and `normalised` is h_t over
the same recurrence run on ones. They differ by a positive factor per head and time, so unit keys
made of them are equal.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ConfigError, ShapeError, unknown_name
from jaxmem.ops import leaky_average_xla as plain
from jaxmem.ops.checks import (
    check_axes,
    check_documents,
    check_floating,
    check_precision,
    check_shape,
)
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
FASTEST = 1e4
"""Rates from here on forget all in one step; their gradient is 0."""
HeadSums = Float[Array, "B H K"]


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
      rate: decay rate per token and head, >= 0 (see `decay_rate`); one from 1e4 to inf forgets all
        in one step, with gradient 0.
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
      ShapeError: x has no token, the rates, the state or the documents do not fit it, or the state
        does not fit the scaling.
      DTypeError: x, rate or the state are not floating point.
      ConfigError: `chunk_size` is less than 1.
      UnknownName: no such scaling, precision or implementation.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Memory Mosaics (arXiv 2405.06394), eq. 7; nanoMosaics `LeakyAvg` (`sum`), the
      Library's regular form (`scaled`) and its CUDA operator (`normalised`). Differs: the CUDA
      operator returns a decay gradient of wrong magnitude and, for negative parameters, wrong
      sign; this is the true one.
    """
    _check(x, rate, scaling, initial_state, chunk_size)
    check_documents("leaky_average", x.shape[:2], segment_ids, initial_segment)
    check_precision(precision)
    form = resolve(
        "leaky_average", implementation, x, rate, interpret=interpret, config=config
    ).implementation
    wide = at_least_float32(x).dtype
    # exp(-FASTEST) is 0 in every dtype; a rate of inf would be multiplied by 0 steps, which is NaN.
    rate = jnp.minimum(rate.astype(wide), FASTEST)
    batch, _, heads, width = x.shape
    if initial_state is None:
        initial_state = init_leaky_state(batch, heads, width, scaling=scaling, dtype=wide)
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


declare(leaky_average, pallas=kernels.unmet, xla=None, reference=None)


def _check(
    x: Array, rate: Array, scaling: Scaling, state: LeakyState | None, chunk_size: int | None
) -> None:
    op = "leaky_average"
    check_floating(op, x=x, rate=rate)
    if scaling not in get_args(Scaling):
        raise unknown_name("scaling", scaling, get_args(Scaling))
    check_axes(op, "x", x, "B T H K")
    check_shape(op, "rate", rate, x.shape[2:3], "one rate per head")
    if state is not None:
        _check_state(state, x, scaling)
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(
            f"{op}: chunk_size={chunk_size} is no number of tokens. "
            "Use 1 or more, or None for what is fastest here."
        )


def _check_state(state: LeakyState, x: Array, scaling: Scaling) -> None:
    op, (batch, _, heads, width) = "leaky_average", x.shape
    total, weight = "initial_state.total", "initial_state.weight"
    check_floating(op, **{total: state.total, weight: state.weight})
    check_shape(op, total, state.total, (batch, heads, width), "one sum per row and channel")
    check_shape(op, weight, state.weight, (batch, heads, 1), "one weight per row and head")
    if (state.weight is None) == (scaling == "normalised"):
        raise ShapeError(
            f"{op}: the initial state has {'no' if state.weight is None else 'a'} weight, which "
            f"only `normalised` carries on; the scaling is {scaling!r}. "
            f"Make it with init_leaky_state(..., scaling={scaling!r})."
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
