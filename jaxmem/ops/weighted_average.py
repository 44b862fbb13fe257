r"""Gated weighted average: a running mean whose weights grow, decay and restart at every step.

y_t = (Σ_{i<t} e^{w_{i+1} + … + w_{t-1} + k_i} v_i + e^{u + k_t} v_t) / (the same with v = 1)

With constant w this is the `wkv` of RWKV-4 and the operator behind the efficient form of Memory
Mosaics; with time-varying w, k = log g and no bonus its direction is that of the gated keys of
Memory Mosaics v2, because the unit norm cancels the denominator.

What is carried is a mean, which is bounded by the values, and the logarithm of the total weight, so
log-weights of any size are safe.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ShapeError
from jaxmem.ops.checks import (
    as_arrays,
    check_axes,
    check_documents,
    check_floating,
    check_shape,
    is_empty,
)
from jaxmem.ops.dispatch import Choice, Implementation, declare, few_tokens, resolve
from jaxmem.ops.gated_scan import GatedScanOutput, gated_scan, recurrence
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.platforms import on_cpu_or_elsewhere
from jaxmem.ops.segments import spans
from jaxmem.shapes import RowInts, SegmentIds
from pallas_kernels import gated_scan as kernels
from pallas_kernels._compat import vary_like
from pallas_kernels.gated_scan import GatedScanConfig

EMPTY = -3e38
"""Log of a total weight of nothing: finite, so that no difference is NaN, and below every other."""
_PADDING = -3.3e38
"""Log-weight of a padded token: nothing even beside a total of nothing."""
LIMIT = 1e32
"""Largest size of a log-weight or log-decay; what exceeds it, such as -inf, counts as this."""


Broadcast = (
    Float[Array, "#B #T #H _"]
    | Float[Array, "#T #H _"]
    | Float[Array, "#H _"]
    | Float[Array, "_"]
    | Float[Array, ""]
)
"""What broadcasts to a log-weight."""


class WeightedState(NamedTuple):
    """What a weighted average carries from token to token, float32 or wider."""

    mean: Float[Array, "B H V"]
    """Weighted mean of the values seen."""
    log_total: Float[Array, "B H W"]
    """Logarithm of their total weight, `EMPTY` before any; W is 1 or V."""


class WeightedOutput(NamedTuple):
    """What a weighted average returns."""

    y: Float[Array, "B T H V"]
    """Averages, in the dtype of the values."""
    state: WeightedState
    """The state after the last token."""


def init_weighted_state(
    batch: int, heads: int, width: int, *, weights: int = 1, dtype: DTypeLike = jnp.float32
) -> WeightedState:
    """Return the state before any token; `weights` is 1, or `width` if each channel has its own."""
    mean = jnp.zeros((batch, heads, width), dtype)
    return WeightedState(mean, jnp.full((batch, heads, weights), EMPTY, dtype))


def weighted_average(
    values: Float[Array, "B T H V"],
    log_weight: Float[Array, "B T H W"],
    log_decay: Broadcast,
    *,
    bonus: Broadcast | None = None,
    initial_state: WeightedState | None = None,
    segment_ids: SegmentIds | None = None,
    initial_segment: RowInts | None = None,
    implementation: Implementation = "auto",
    config: GatedScanConfig | None = None,
    interpret: bool | None = None,
) -> WeightedOutput:
    r"""Average the values so far, each with a weight that decays from step to step.

    Q_t = e^{w_t} Q_{t-1} + e^{k_t},  A_t = (e^{w_t} Q_{t-1} A_{t-1} + e^{k_t} v_t) / Q_t
    y_t = A_t                                                            without a bonus
    y_t = (Q_{t-1} A_{t-1} + e^{u_t + k_t} v_t) / (Q_{t-1} + e^{u_t + k_t})   with one

    Cost: that of a gated scan over H V channels, which takes most of it, and of one over H W log
    totals. Kept for the backward pass: means, gates and log totals. Without any row or token the
    result is empty and the state stays as it is.

    Args:
      values: v; their dtype is that of y.
      log_weight: k, one per head (W = 1) or per channel (W = V), of any size; one of -1e32
        or less, such as -inf, weighs nothing beside any larger one.
      log_decay: w, usually <= 0, of a shape that broadcasts to that of the log-weights, such as
        [H 1] for a constant per head; w_t applies between steps t - 1 and t.
      bonus: u, added to the log-weight of a token in its own output only, of such a shape too.
        None: the own token counts as it will for later ones.
      initial_state: means and totals carried over from earlier tokens; None is no token.
      segment_ids: document of each token; the average starts anew with each document, and a padded
        token (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      implementation: `reference` carries mean and total from token to token; `xla` and `pallas`
        find all totals first, and then all means by a gated scan in that form.
      config: launch configuration of the kernels of that scan; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      y, and the state after the last token.

    Raises:
      ShapeError: there is no head or channel, or the shapes do not fit together.
      DTypeError: an array is not floating point, or documents are no integers.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: RWKV-4 (arXiv 2305.13048), eq. 16; Memory Mosaics (arXiv 2405.06394), CUDA operator
      of the Library; gated keys of arXiv 2507.03285. Differs: the gradient of w is that of w
      itself, where the CUDA operator returns it times w.
    """
    operands = as_arrays(values, log_weight, log_decay, bonus, initial_state)
    values, log_weight, log_decay, bonus, initial_state = operands
    segment_ids, initial_segment = as_arrays(segment_ids, initial_segment)
    weights = _check(*operands)
    check_documents("weighted_average", values.shape[:2], segment_ids, initial_segment)
    choice = resolve("weighted_average", implementation, values, interpret=interpret, config=config)
    dtype = at_least_float32(values).dtype
    if initial_state is None:
        batch, _, heads, width = values.shape
        initial_state = init_weighted_state(batch, heads, width, weights=weights[-1], dtype=dtype)
    mean, log_total = (a.astype(dtype) for a in initial_state)
    start = WeightedState(mean, jnp.maximum(log_total, EMPTY))
    if is_empty(values):
        return WeightedOutput(values, start)
    v = values.astype(dtype)
    k, w, u = (_bounded(a, dtype, weights) for a in (log_weight, log_decay, bonus))
    valid = reset = None
    if segment_ids is not None:
        rows = spans(segment_ids, initial_segment)
        valid, reset = (a[..., None, None] for a in (rows.valid, rows.reset))
        # A NaN in padding would reach real tokens as 0 * NaN, at least in the gradients.
        v, k, w = (jnp.where(valid, a, 0.0) for a in (v, k, w))
        u = None if u is None else jnp.where(valid, u, 0.0)
    tokens = _Inputs(v, k, w, u, valid, reset)
    start = jax.tree.map(lambda a: vary_like(a, tokens), start)
    if choice.plain == "reference":
        y, state = _reference(tokens, start)
    else:
        scan = functools.partial(
            gated_scan, implementation=_scan_by(choice), config=config, interpret=interpret
        )
        y, state = _convex(scan, tokens, start)
    if valid is not None:
        y = jnp.where(valid, y, 0.0)
    return WeightedOutput(y.astype(values.dtype), state)


def _scan_by(choice: Choice) -> Implementation:
    """Return what to ask of the gated scan, so that it makes the same choice."""
    return cast(Implementation, "auto" if choice.elsewhere else choice.implementation)


def _pallas_unmet(values: Any, *, config: GatedScanConfig | None) -> str | None:
    batch, length, heads, width = values.shape
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    flat = jax.ShapeDtypeStruct((batch, length, heads * width), dtype)
    return kernels.unmet(flat, flat, config=config) or few_tokens(length)


def _bounded(logs: Array | None, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
    """Return logarithms that sums and differences of cannot be NaN."""
    if logs is None:
        return None
    return jnp.broadcast_to(jnp.clip(logs.astype(dtype), -LIMIT, LIMIT), shape)


declare(weighted_average, pallas=_pallas_unmet, xla=None, reference=None)


class _Inputs(NamedTuple):
    """What the recurrence reads of one token, or of all."""

    v: Array
    k: Array
    w: Array
    u: Array | None
    valid: Array | None
    """It counts, [B T 1 1]; None: all do."""
    reset: Array | None
    """It starts anew; None: none does."""


def _check(
    values: Array,
    log_weight: Array,
    log_decay: Array,
    bonus: Array | None,
    state: WeightedState | None,
) -> tuple[int, ...]:
    """Return the shape [B T H W] that log-weights, decays and bonus share; W is 1 or V."""
    op = "weighted_average"
    check_floating(op, values=values, log_weight=log_weight, log_decay=log_decay, bonus=bonus)
    check_axes(op, "values", values, "B T H V")
    operands = [a.shape for a in (log_weight, log_decay, bonus) if a is not None]
    try:
        shape = tuple(jnp.broadcast_shapes(*operands))
    except ValueError:
        shape = None
    if shape not in ((*values.shape[:3], 1), values.shape):
        raise ShapeError(
            f"{op}: log-weight, log-decay (and bonus) of shapes "
            f"{', '.join(map(str, operands))} do not fit values {values.shape}. "
            "Expected shapes that broadcast to [B T H 1] or [B T H V]."
        )
    if state is not None:
        _check_state(state, values, shape)
    return shape


def _check_state(state: WeightedState, values: Array, weights: tuple[int, ...]) -> None:
    op, (batch, _, heads, width) = "weighted_average", values.shape
    mean, total = "initial_state.mean", "initial_state.log_total"
    check_floating(op, **{mean: state.mean, total: state.log_total})
    what = "one mean per row and channel"
    check_shape(op, mean, state.mean, (batch, heads, width), what)
    what = "as many totals per row and head as log-weights (init_weighted_state(..., weights=...))"
    check_shape(op, total, state.log_total, (batch, heads, weights[-1]), what)


def _reference(tokens: _Inputs, start: WeightedState) -> tuple[Array, WeightedState]:
    """Carry the mean and the total, one token at a time: the definition, and the decode step."""

    def step(before: tuple[Array, _Log], at: _Inputs) -> tuple[tuple[Array, _Log], Array]:
        mean, total = before
        if at.reset is not None:
            total = _restart(total, at.reset)
        x = _log_odds(total, at.w, at.k)
        after = jax.nn.sigmoid(x) * mean + jax.nn.sigmoid(-x) * at.v, _add(total, at.w, at.k)
        y = after[0]
        if at.u is not None:
            x = _log_odds(total, -at.u, at.k)
            y = jax.nn.sigmoid(x) * mean + jax.nn.sigmoid(-x) * at.v
        valid = at.valid
        if valid is not None:
            after = jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, before)
        return after, y

    first = start.mean, _Log(start.log_total, jnp.zeros_like(start.log_total))
    streams = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
    (mean, total), y = lax.scan(step, first, streams)
    return jnp.moveaxis(y, 0, 1), WeightedState(mean, total.anchor + total.rest)


class _Log(NamedTuple):
    """Logarithm of a total weight, anchor + rest: a log-weight of a token, and what differs.

    Only differences of log-weights meet the decays, so neither is lost in the other's rounding.
    """

    anchor: Array
    rest: Array


def _log_odds(total: _Log, w: Array, k: Array) -> Array:
    """Return the log of a total's share, decayed by w, over the share of a weight e^k."""
    return (w + total.rest) + (total.anchor - k)


def _add(total: _Log, w: Array, k: Array) -> _Log:
    return _join((w, total), (w, _Log(k, jnp.zeros_like(k))))[1]


def _join(early: tuple[Array, _Log], late: tuple[Array, _Log]) -> tuple[Array, _Log]:
    """Combine log-decays and totals of two spans of tokens; the anchor is that of the larger."""
    (before, old), (w, new) = early, late
    x = (w + old.rest - new.rest) + (old.anchor - new.anchor)
    larger = x > 0
    rest = jnp.where(larger, w + old.rest, new.rest)
    rest += jnp.log1p(jnp.exp(jnp.where(larger, -x, x)))
    return before + w, _Log(jnp.where(larger, old.anchor, new.anchor), rest)


def _restart(total: _Log, reset: Array) -> _Log:
    return _Log(jnp.where(reset, EMPTY, total.anchor), jnp.where(reset, 0.0, total.rest))


def _convex(
    scan: Callable[..., GatedScanOutput], tokens: _Inputs, start: WeightedState
) -> tuple[Array, WeightedState]:
    """Carry the mean by a gated scan, after the totals, of which there are far fewer.

    A_t = a A_{t-1} + (1 - a) v_t with a = sigmoid(x), x = w_t + log Q_{t-1} - k_t: a convex
    combination. Both shares come from x, so that a weight of e^-100 has a gradient of its own size
    rather than the rounding of a difference.
    """
    v, k, w, u, valid, _ = tokens
    before, last = _log_totals(tokens, start.log_total)
    x = _log_odds(before, w, k)
    log_old, new = jax.nn.log_sigmoid(x), jax.nn.sigmoid(-x)
    if valid is not None:
        log_old, new = jnp.where(valid, log_old, 0.0), jnp.where(valid, new, 0.0)
    batch, length, heads, width = v.shape
    flat = (batch, length, heads * width)
    means, mean = scan(
        (new * v).reshape(flat),
        jnp.broadcast_to(log_old, v.shape).reshape(flat),
        initial_state=start.mean.reshape(batch, heads * width),
    )
    means = means.reshape(v.shape)
    state = WeightedState(mean.reshape(start.mean.shape), last)
    if u is None:
        return means, state
    x = _log_odds(before, -u, k)
    old_means = jnp.concatenate([start.mean[:, None], means[:, :-1]], axis=1)
    return jax.nn.sigmoid(x) * old_means + jax.nn.sigmoid(-x) * v, state


def _log_totals(tokens: _Inputs, start: Array) -> tuple[_Log, Array]:
    """Return log Q_{t-1} for every t, EMPTY at a reset, and the last log Q."""
    k, w, valid, reset = tokens.k, tokens.w, tokens.valid, tokens.reset
    if valid is not None and reset is not None:
        w = jnp.where(valid, jnp.where(reset, EMPTY, w), 0.0)
        k = jnp.where(valid, k, _PADDING)
    totals = _sum_weights(k, w, start)
    before = _shift(totals, start)
    if reset is not None:
        before = _restart(before, reset)
    return before, totals.anchor[:, -1] + totals.rest[:, -1]


@jax.custom_jvp
def _sum_weights(k: Array, w: Array, start: Array) -> _Log:
    """Return log Q_t = log(e^{w_t} Q_{t-1} + e^{k_t}) of every token.

    Its tangent is a gated scan: dlog Q_t = a_t (dlog Q_{t-1} + dw_t) + (1 - a_t) dk_t, where a_t is
    the share of Q_{t-1} in Q_t.
    """
    first = _Log(start, jnp.zeros_like(start))
    elsewhere = _tree if isinstance(k.shape[1], int) else _steps  # a tree has a known height
    return on_cpu_or_elsewhere(_steps, elsewhere, k, w, first)


@_sum_weights.defjvp
def _differentiate(primals: tuple, tangents: tuple) -> tuple[_Log, _Log]:
    k, w, start = primals
    dk, dw, dstart = tangents
    totals = _sum_weights(*primals)
    x = _log_odds(_shift(totals, start), w, k)
    inputs = jax.nn.sigmoid(x) * dw + jax.nn.sigmoid(-x) * dk
    batch, length, heads, width = k.shape
    flat = (batch, length, heads * width)
    slopes, _ = recurrence(
        inputs.reshape(flat), jax.nn.log_sigmoid(x).reshape(flat), dstart.reshape(batch, -1)
    )
    return totals, _Log(jnp.zeros_like(totals.anchor), slopes.reshape(k.shape))


def _shift(totals: _Log, start: Array) -> _Log:
    """Return the total before each token."""
    pairs = zip((start, jnp.zeros_like(start)), totals, strict=True)
    return _Log(*(jnp.concatenate([a[:, None], rest[:, :-1]], axis=1) for a, rest in pairs))


def _steps(k: Array, w: Array, start: _Log) -> _Log:
    """Take a step per token: on a CPU a scan is a plain loop."""

    def step(total: _Log, inputs: tuple[Array, Array]) -> tuple[_Log, _Log]:
        total = _add(total, *inputs)
        return total, total

    _, totals = lax.scan(step, start, (jnp.moveaxis(w, 1, 0), jnp.moveaxis(k, 1, 0)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), totals)


def _tree(k: Array, w: Array, start: _Log) -> _Log:
    """Combine spans of tokens in log T levels: on a GPU a step per token is a launch per token."""
    first = _add(start, w[:, 0], k[:, 0])
    zero = jnp.zeros_like(k[:, 1:])
    pairs = zip(first, (k[:, 1:], zero), strict=True)
    totals = _Log(*(jnp.concatenate([a[:, None], rest], axis=1) for a, rest in pairs))
    return lax.associative_scan(_join, (w, totals), axis=1)[1]
