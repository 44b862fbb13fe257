r"""Leaky average: one decaying sum per head, the short-term memory in the keys of Memory Mosaics.

h_t = λ h_{t-1} + x_t,  λ = exp(-rate) in (0, 1]

Three published scalings of it: `sum` is h_t, `scaled` is (1-λ) h_t, and `normalised` is h_t over
the same recurrence run on ones. They differ by a positive factor per head and time, so unit keys
made of them are equal.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ConfigError, ShapeError, unknown_name
from jaxmem.ops.checks import (
    as_arrays,
    check_axes,
    check_documents,
    check_floating,
    check_precision,
    check_shape,
    is_empty,
)
from jaxmem.ops.dispatch import Choice, Implementation, declare, few_tokens, resolve
from jaxmem.ops.leaky_average_xla import Options, leaky_sums
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.platforms import Kernel, run_kernel
from jaxmem.ops.segments import spans
from jaxmem.shapes import HeadScalars, Queries, RowInts, SegmentIds
from pallas_kernels import leaky_average as kernels
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels._interpret import interpreted
from pallas_kernels.leaky_average import Clock, GradInputs, Inputs, LeakyAverageConfig

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


class LeakyOutput(NamedTuple):
    """What a leaky average returns."""

    y: Queries
    """Averages, in the dtype of x."""
    state: LeakyState
    """Sums after the last token."""


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
) -> LeakyOutput:
    r"""Average the past of each channel with weights that decay at its head's rate.

    h_t = exp(-rate) h_{t-1} + x_t
    y_t = h_t  |  (1 - exp(-rate)) h_t  |  h_t / Σ_{i≤t} exp(-rate (t-i))

    Cost per head: 2 T C K FLOPs in chunks of C tokens, 2 T K token by token. Kept for the backward
    pass: h, in the dtype of x for `sum` and in float32 for the other two. The recurrence is carried
    in float32 or wider. Without any row or token the result is empty and the state stays as it is.

    Args:
      x: inputs.
      rate: decay rate per token and head, >= 0 (see `decay_rate`); one from 1e4 to inf forgets all
        in one step, with gradient 0.
      scaling: which of the three published forms to return.
      initial_state: sums carried over from earlier tokens; None is zero.
      segment_ids: document of each token; the sum starts anew with each document, and a padded
        token (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      chunk_size: tokens per chunk of the XLA form, speed only, never the result; None: token by
        token on a CPU, where that is fastest, and for a symbolic T, 64 elsewhere.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` the same or
        chunks (see `chunk_size`), `pallas` chunks in one pass over memory.
      precision: of the products within chunks; None and `high`: about float32, also for half
        precision inputs; `default`: one product in TF32 or the dtype of x, with a relative error of
        the weights up to 2^-11 in float32 and float16, 2^-9 in bfloat16; `highest`: float32.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      y in the dtype of x, and the state after the last token.

    Raises:
      ShapeError: a head has no channel, the rates, the state or the documents do not fit x, or the
        state does not fit the scaling.
      DTypeError: x, rate or the state are not floating point, or documents no integers.
      ConfigError: `chunk_size` is less than 1.
      UnknownName: no such scaling, precision or implementation.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Memory Mosaics (arXiv 2405.06394), eq. 7; nanoMosaics `LeakyAvg` (`sum`), the
      Library's regular form (`scaled`) and its CUDA operator (`normalised`). Differs: the CUDA
      operator returns a decay gradient of wrong magnitude and, for negative parameters, wrong
      sign; this is the true one.
    """
    x, rate, initial_state = as_arrays(x, rate, initial_state)
    segment_ids, initial_segment = as_arrays(segment_ids, initial_segment)
    _check(x, rate, scaling, initial_state, chunk_size)
    check_documents("leaky_average", x.shape[:2], segment_ids, initial_segment)
    check_precision(precision)
    choice = resolve("leaky_average", implementation, x, rate, interpret=interpret, config=config)
    wide = at_least_float32(x).dtype
    # exp(-FASTEST) is 0 in every dtype; a rate of inf would be multiplied by 0 steps, which is NaN.
    rate = jnp.minimum(rate.astype(wide), FASTEST)
    batch, _, heads, width = x.shape
    if initial_state is None:
        initial_state = init_leaky_state(batch, heads, width, scaling=scaling, dtype=wide)
    total, weight = jax.tree.map(lambda a: a.astype(wide), initial_state)
    if is_empty(x):
        return LeakyOutput(x, LeakyState(total, weight))
    clock = None if segment_ids is None else _clock(segment_ids, initial_segment)
    options = Options(chunk_size, precision or "high", x.dtype if scaling == "sum" else wide)
    static = _Static(options, config, interpreted(interpret))
    sums, total = _run(choice, static, Inputs(x, rate, total, clock))
    y = sums
    if scaling == "scaled":
        y = sums * -jnp.expm1(-rate)[:, None]
    elif weight is not None:
        ones = vary_like(jnp.ones((*x.shape[:3], 1), wide), x)
        # One channel is too narrow for a kernel.
        weights, weight = _run_plain(choice, options, Inputs(ones, rate, weight, clock))
        # A row that has only seen padding has no weight yet; its outputs are masked below.
        y = sums / jnp.where(weights == 0, 1.0, weights)
    if clock is not None:
        y = jnp.where(clock.valid[:, :, None, None], y, 0.0)
    return LeakyOutput(y.astype(x.dtype), LeakyState(total, weight))


def _pallas_unmet(x: Any, rate: Any, *, config: LeakyAverageConfig | None) -> str | None:
    return kernels.unmet(x, rate, config=config) or few_tokens(x.shape[1])


declare(leaky_average, pallas=_pallas_unmet, xla=None, reference=None)


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

    options: Options
    config: LeakyAverageConfig | None
    interpret: bool


def _run(choice: Choice, static: _Static, inputs: Inputs) -> tuple[Array, Array]:
    """Return all sums, standing still at padding, and the last of them, float32 or wider."""
    if choice.kernel is None:
        return _run_plain(choice, static.options, inputs)
    return run_kernel(_KERNEL, static, *inputs, elsewhere=choice.plain is not None)


def _run_plain(choice: Choice, options: Options, inputs: Inputs) -> tuple[Array, Array]:
    if choice.plain == "reference":
        return _reference(inputs)
    return leaky_sums(options, *inputs)


def _reference(inputs: Inputs) -> tuple[Array, Array]:
    """Run the recurrence one token at a time: the definition, and the decode step."""
    x, rate, start, clock = inputs
    x = x.astype(rate.dtype)
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

    start = vary_like(start, x, rate, clock)
    final, sums = lax.scan(step, start, (factor, jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(sums, 0, 1), final


def _forward(static: _Static, operands: tuple) -> tuple[tuple[Array, Array], Array]:
    sums, final = kernels.leaky_sums_forward(
        Inputs(*operands), out_dtype=static.options.dtype, **_launch_options(static)
    )
    return (sums, final), sums


def _backward(static: _Static, operands: tuple, sums: Array, grads: tuple) -> tuple:
    """Add <dstart, start> to the products of a decaying first token; drate = -Σ products."""
    x, rate, start, clock = operands
    dsums, dfinal = grads
    dx, products, dstart = kernels.leaky_sums_backward(
        GradInputs(dsums, dfinal, sums, rate, clock), x_dtype=x.dtype, **_launch_options(static)
    )
    first = jnp.sum(dstart * start, axis=2)
    if clock is not None:
        # After leading padding the first decay comes later, and is among the products.
        first = jnp.where(clock.valid[:, :1], first, 0.0)
    drate = -(products + jnp.sum(first, axis=0))
    return dx, drate, dstart, jax.tree.map(lambda _: None, clock)


def _plain(static: _Static, operands: tuple) -> tuple[Array, Array]:
    return leaky_sums(static.options, *operands)


_KERNEL = Kernel("leaky_average", _forward, _backward, _plain)


def _launch_options(static: _Static) -> dict[str, Any]:
    return {
        "config": static.config,
        "precision": static.options.precision,
        "interpret": static.interpret,
    }
