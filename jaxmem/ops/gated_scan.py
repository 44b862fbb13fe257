r"""Gated scan: a linear recurrence with one gate per token and channel.

h_t = a_t h_{t-1} + x_t,  a_t = exp(log_decay_t) in [0, 1]

The core of diagonal recurrent layers (RG-LRU, HGRN, minGRU). Gates come as logarithms, as all
decays do here, and the layout is [B T D]: channels know no heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.checks import (
    as_arrays,
    check_axes,
    check_documents,
    check_floating,
    check_shape,
    is_empty,
)
from jaxmem.ops.dispatch import Implementation, declare, few_tokens, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.platforms import Kernel, on_cpu_or_elsewhere, run_kernel
from jaxmem.ops.segments import spans
from jaxmem.shapes import Activations, ActivationsAt, RowInts, SegmentIds
from pallas_kernels import gated_scan as kernels
from pallas_kernels._compat import vary_like
from pallas_kernels._interpret import interpreted
from pallas_kernels.gated_scan import (
    DECAY,
    PADDING,
    RESET,
    GatedScanConfig,
    GradInputs,
    Inputs,
)


class GatedScanOutput(NamedTuple):
    """What a gated scan returns."""

    h: Activations
    """States after each token, in the dtype of x."""
    state: ActivationsAt
    """The state after the last token, float32 or wider."""


def gated_scan(
    x: Activations,
    log_decay: Activations,
    *,
    initial_state: ActivationsAt | None = None,
    segment_ids: SegmentIds | None = None,
    initial_segment: RowInts | None = None,
    implementation: Implementation = "auto",
    config: GatedScanConfig | None = None,
    interpret: bool | None = None,
) -> GatedScanOutput:
    r"""Run h_t = exp(log_decay_t) h_{t-1} + x_t, with gates of every token and channel.

    Cost: 2 B T D FLOPs, so memory is what takes time. Kept for the backward pass: h and log_decay.
    The recurrence is carried in float32 or wider, whatever the dtype of x and log_decay. Without
    any row or token the result is empty and the state stays as it is.

    Args:
      x: inputs.
      log_decay: logarithms of the gates, <= 0, not checked. -inf is a reset: the state starts anew
        from x_t, and the gradient of that gate is 0.
      initial_state: h before the first token; None is zero.
      segment_ids: document of each token; h starts anew with each document, and a padded token
        (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` the same on a CPU and
        a tree of log T levels elsewhere unless T is symbolic, `pallas` one pass over memory.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      h in the dtype of x, and h after the last token in float32 or wider.

    Raises:
      ShapeError: x, log_decay, the state and the documents do not fit, or there is no channel.
      DTypeError: x, log_decay or the state are not floating point, or documents no integers.
      UnknownName: no such implementation.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Martin and Cundy 2018 (arXiv 1709.04057), eq. 5; De et al. 2024 (Griffin, arXiv
      2402.19427), eq. 4, where x is the normalised and gated input.
    """
    x, log_decay, initial_state = as_arrays(x, log_decay, initial_state)
    segment_ids, initial_segment = as_arrays(segment_ids, initial_segment)
    _check(x, log_decay, initial_state)
    check_documents("gated_scan", x.shape[:2], segment_ids, initial_segment)
    choice = resolve("gated_scan", implementation, x, log_decay, interpret=interpret, config=config)
    wide = at_least_float32(x).dtype
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), wide)
    start = initial_state.astype(wide)
    if is_empty(x):
        return GatedScanOutput(x, start)
    kinds = None if segment_ids is None else _kinds(segment_ids, initial_segment)
    inputs = Inputs(x, log_decay, start, kinds)
    if choice.kernel is not None:
        static = _Static(config, interpreted(interpret))
        h, final = run_kernel(_KERNEL, static, *inputs, elsewhere=choice.plain is not None)
    else:
        h, final = (_reference if choice.plain == "reference" else recurrence)(*inputs)
    if kinds is not None:
        h = jnp.where(kinds[:, :, None] == PADDING, 0.0, h)
    return GatedScanOutput(h.astype(x.dtype), final)


def _pallas_unmet(x: Any, log_decay: Any, *, config: GatedScanConfig | None) -> str | None:
    return kernels.unmet(x, log_decay, config=config) or few_tokens(x.shape[1])


declare(gated_scan, pallas=_pallas_unmet, xla=None, reference=None)


def _check(x: Array, log_decay: Array, initial_state: Array | None) -> None:
    op = "gated_scan"
    check_floating(op, x=x, log_decay=log_decay, initial_state=initial_state)
    check_axes(op, "x", x, "B T D")
    check_shape(op, "log_decay", log_decay, x.shape, "one gate per token and channel of x")
    what = "one state per row and channel"
    check_shape(op, "initial_state", initial_state, (x.shape[0], x.shape[2]), what)


def _kinds(segment_ids: SegmentIds, initial_segment: RowInts | None) -> Array:
    rows = spans(segment_ids, initial_segment)
    kinds = jnp.where(rows.reset, RESET, DECAY)
    return jnp.where(rows.valid, kinds, PADDING).astype(jnp.int32)


def _reference(
    x: Array, log_decay: Array, start: Array, kinds: Array | None
) -> tuple[Array, Array]:
    """Run the recurrence one token at a time: the definition, and the decode step."""
    x, log_decay = _silent(x.astype(start.dtype), kinds), _silent(log_decay, kinds)
    start = vary_like(start, x, log_decay, kinds)
    if kinds is None:
        kinds = jnp.full(x.shape[:2], DECAY)

    def step(h: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_t, log_a, kind = inputs
        kind = kind[:, None]
        started = jnp.where(kind == RESET, 0.0, jnp.exp(log_a.astype(h.dtype)) * h)
        h = jnp.where(kind == PADDING, h, started + x_t)
        return h, h

    inputs = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(log_decay, 1, 0), kinds.T)
    final, h = lax.scan(step, start, inputs)
    return jnp.moveaxis(h, 0, 1), final


@jax.custom_jvp
def recurrence(
    x: Array, log_decay: Array, start: Array, kinds: Array | None = None
) -> tuple[Array, Array]:
    """Return h in the dtype of x, standing still at padding, and the last h in that of the start.

    A tangent obeys the same recurrence, dh_t = a_t dh_{t-1} + dx_t + a_t h_{t-1} dlog_decay_t, and
    its transpose, which JAX derives, runs it backwards in time.

    Args:
      x: inputs [B T D].
      log_decay: logarithms of the gates [B T D].
      start: h before the first token [B D], float32 or wider.
      kinds: kind of each token of packed rows [B T]; None: every token decays.
    """
    gates, inputs = _gates(log_decay, kinds, start.dtype), _silent(x.astype(start.dtype), kinds)
    start = vary_like(start, inputs, gates)
    elsewhere = _tree if isinstance(x.shape[1], int) else _steps  # a tree has a known height
    h, final = on_cpu_or_elsewhere(_steps, elsewhere, inputs, gates, start)
    return h.astype(x.dtype), final


@recurrence.defjvp
def _differentiate(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    _, log_decay, start, kinds = primals
    h, final = recurrence(*primals)
    # Autodiff alone would keep gates and shifted states besides h and log_decay, which are there.
    linear = jax.checkpoint(_tangent, prevent_cse=False)
    return (h, final), linear(h, log_decay, start, kinds, *tangents[:3])


def _tangent(
    h: Array,
    log_decay: Array,
    start: Array,
    kinds: Array | None,
    dx: Array,
    dlog_decay: Array,
    dstart: Array,
) -> tuple[Array, Array]:
    """Return the tangents of all h and of the last one, linear in those of the operands."""
    before = jnp.concatenate([start[:, None], h[:, :-1].astype(start.dtype)], axis=1)
    slopes = before * jnp.exp(log_decay.astype(start.dtype))
    if kinds is not None:
        slopes = jnp.where(kinds[:, :, None] == DECAY, slopes, 0.0)
    dx = dx.astype(start.dtype) + slopes * dlog_decay.astype(start.dtype)
    dh, dfinal = recurrence(dx, log_decay, dstart, kinds)
    return dh.astype(h.dtype), dfinal


def _silent(x: Array, kinds: Array | None) -> Array:
    """Return 0 at padding, whatever stands there; 0 * NaN would reach other tokens' gradients."""
    return x if kinds is None else jnp.where(kinds[:, :, None] == PADDING, 0.0, x)


def _gates(log_decay: Array, kinds: Array | None, dtype: Any) -> Array:
    """Return a: the gate, 1 at padding and 0 at a reset."""
    gates = jnp.exp(log_decay.astype(dtype))
    if kinds is None:
        return gates
    kind = kinds[:, :, None]
    return jnp.where(kind == DECAY, gates, jnp.where(kind == PADDING, 1.0, 0.0))


def _steps(x: Array, gates: Array, start: Array) -> tuple[Array, Array]:
    """Take a step per token: the fastest form on a CPU, where a scan is a plain loop."""

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a, x_t = inputs
        h = a * h + x_t
        return h, h

    final, h = lax.scan(step, start, (jnp.moveaxis(gates, 1, 0), jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(h, 0, 1), final


def _tree(x: Array, gates: Array, start: Array) -> tuple[Array, Array]:
    """Combine spans of tokens in log T levels: on a GPU a step per token is a launch per token."""
    x = jnp.concatenate([x[:, :1] + gates[:, :1] * start[:, None], x[:, 1:]], axis=1)
    h = lax.associative_scan(_join, (gates, x), axis=1)[1]
    return h, h[:, -1]


def _join(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
    return early[0] * late[0], late[0] * early[1] + late[1]


class _Static(NamedTuple):
    """What a call of the kernels does not trace."""

    config: GatedScanConfig | None
    interpret: bool


def _forward(static: _Static, operands: tuple) -> tuple[tuple[Array, Array], Array]:
    h, final = kernels.gated_scan_forward(Inputs(*operands), **static._asdict())
    return (h, final), h


def _backward(static: _Static, operands: tuple, h: Array, grads: tuple) -> tuple:
    x, log_decay, start, kinds = operands
    dh, dfinal = grads
    inputs = GradInputs(dh, dfinal, h, log_decay, start, kinds)
    dx, dlog_decay, dstart = kernels.gated_scan_backward(
        inputs, x_dtype=x.dtype, **static._asdict()
    )
    return dx, dlog_decay, dstart, None


def _plain(static: _Static, operands: tuple) -> tuple[Array, Array]:
    del static
    return recurrence(*operands)


_KERNEL = Kernel("gated_scan", _forward, _backward, _plain)
