r"""Gated scan: a linear recurrence with one gate per token and channel.

h_t = a_t h_{t-1} + x_t,  a_t = exp(log_decay_t) in [0, 1]

The core of diagonal recurrent layers (RG-LRU, HGRN, minGRU). Gates come as logarithms, as all
decays do here, and the layout is [B T D]: channels know no heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.checks import check_axes, check_documents, check_floating, check_shape
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import spans
from jaxmem.shapes import Activations, ActivationsAt, RowInts, SegmentIds
from pallas_kernels import gated_scan as kernels
from pallas_kernels._interpret import interpreted, on_cpu
from pallas_kernels.gated_scan import DECAY, PADDING, RESET, GatedScanConfig


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
) -> tuple[Activations, ActivationsAt]:
    r"""Run h_t = exp(log_decay_t) h_{t-1} + x_t, with gates of every token and channel.

    Cost: 2 B T D FLOPs, so memory is what takes time. Kept for the backward pass: h and log_decay.
    The recurrence is carried in float32 or wider, whatever the dtype of x and log_decay.

    Args:
      x: inputs, any T >= 1.
      log_decay: logarithms of the gates, <= 0, not checked. -inf is a reset: the state starts anew
        from x_t, and the gradient of that gate is 0.
      initial_state: h before the first token; None is zero.
      segment_ids: document of each token; h starts anew with each document, and a padded token
        (id 0) leaves it unchanged and gives 0.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` the same on a CPU and
        a tree of log T levels elsewhere, with a gradient of its own, `pallas` one pass over memory.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      h in the dtype of x, and h after the last token in float32 or wider.

    Raises:
      ShapeError: x, log_decay, the state and the documents do not fit, or there is no token.
      DTypeError: x, log_decay or the state are not floating point.
      UnknownName: no such implementation.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Martin and Cundy 2018 (arXiv 1709.04057), eq. 5; De et al. 2024 (Griffin, arXiv
      2402.19427), eq. 4, where x is the normalised and gated input.
    """
    _check(x, log_decay, initial_state)
    check_documents("gated_scan", x.shape[:2], segment_ids, initial_segment)
    form = resolve(
        "gated_scan", implementation, x, log_decay, interpret=interpret, config=config
    ).implementation
    wide = at_least_float32(x).dtype
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), wide)
    start = initial_state.astype(wide)
    kinds = None if segment_ids is None else _kinds(segment_ids, initial_segment)
    static = _Static(form, config, interpreted(interpret), x.dtype)
    h, final = _run(static, x, log_decay, start, kinds)
    if kinds is not None:
        h = jnp.where(kinds[:, :, None] == PADDING, 0.0, h)
    return h.astype(x.dtype), final


declare(gated_scan, pallas=kernels.unmet, xla=None, reference=None)


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


class _Static(NamedTuple):
    """What a call does not trace."""

    form: str
    config: GatedScanConfig | None
    interpret: bool
    dtype: jnp.dtype


def _run(
    static: _Static, x: Array, log_decay: Array, start: Array, kinds: Array | None
) -> tuple[Array, Array]:
    """Return h, standing still at padding, and the last of it, float32 or wider."""
    if static.form == "reference":
        return _reference(x.astype(start.dtype), log_decay, start, kinds)
    return _scan(static, x, log_decay, start, kinds)


def _reference(
    x: Array, log_decay: Array, start: Array, kinds: Array | None
) -> tuple[Array, Array]:
    """Run the recurrence one token at a time: the definition, and the decode step."""
    x, log_decay = _silent(x, kinds), _silent(log_decay, kinds)
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


class _Residuals(NamedTuple):
    """Enough for every backward pass, whichever implementation ran forward."""

    h: Array  # [B T D]
    log_decay: Array  # [B T D]
    start: Array  # [B D]
    kinds: Array | None  # [B T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    static: _Static, x: Array, log_decay: Array, start: Array, kinds: Array | None
) -> tuple[Array, Array]:
    return _scan_forward(static, x, log_decay, start, kinds)[0]


def _scan_forward(
    static: _Static, x: Array, log_decay: Array, start: Array, kinds: Array | None
) -> tuple[tuple[Array, Array], _Residuals]:
    if static.form == "pallas":
        kernel = functools.partial(
            kernels.gated_scan_forward, config=static.config, interpret=static.interpret
        )
        h, final = first_order("gated_scan", kernel)(x, log_decay, start, kinds)
    else:
        x, gates = _silent(x.astype(start.dtype), kinds), _gates(log_decay, kinds, start.dtype)
        run = _steps_forward if on_cpu() else _tree_forward
        h, final = run(x, gates, start)
        h = h.astype(static.dtype)
    return (h, final), _Residuals(h, log_decay, start, kinds)


def _scan_backward(static: _Static, residuals: _Residuals, cotangents: tuple) -> tuple:
    """Run s_t = g_t + a_{t+1} s_{t+1}; dx = s, dlog_decay_t = a_t s_t h_{t-1}."""
    h, log_decay, start, kinds = residuals
    g, g_final = cotangents
    if static.form == "pallas":
        kernel = functools.partial(
            kernels.gated_scan_backward,
            x_dtype=static.dtype,
            config=static.config,
            interpret=static.interpret,
        )
        operands = (g, g_final, h, log_decay, start, kinds)
        return (*first_order("gated_scan", kernel)(*operands), None)
    gates = _gates(log_decay, kinds, start.dtype)
    run = _steps_backward if on_cpu() else _tree_backward
    adjoint, handed = run(g.astype(start.dtype), g_final, gates)
    before = jnp.concatenate([start[:, None], h[:, :-1].astype(start.dtype)], axis=1)
    by_gate = handed * before
    if kinds is not None:
        by_gate = jnp.where(kinds[:, :, None] == DECAY, by_gate, 0.0)
    dx = _silent(adjoint, kinds).astype(static.dtype)
    return dx, by_gate.astype(log_decay.dtype), handed[:, 0], None


_scan.defvjp(_scan_forward, _scan_backward)


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


def _steps_forward(x: Array, gates: Array, start: Array) -> tuple[Array, Array]:
    """Take a step per token: the fastest form on a CPU, where a scan is a plain loop."""

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a, x_t = inputs
        h = a * h + x_t
        return h, h

    final, h = lax.scan(step, start, (jnp.moveaxis(gates, 1, 0), jnp.moveaxis(x, 1, 0)))
    return jnp.moveaxis(h, 0, 1), final


def _steps_backward(g: Array, g_final: Array, gates: Array) -> tuple[Array, Array]:
    """Return s_t and a_t s_t of all tokens."""

    def step(handed: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        a, g_t = inputs
        s = g_t + handed
        return a * s, (s, a * s)

    inputs = (jnp.moveaxis(gates, 1, 0), jnp.moveaxis(g, 1, 0))
    _, (adjoint, handed) = lax.scan(step, g_final, inputs, reverse=True)
    return jnp.moveaxis(adjoint, 0, 1), jnp.moveaxis(handed, 0, 1)


def _tree_forward(x: Array, gates: Array, start: Array) -> tuple[Array, Array]:
    """Combine spans of tokens in log T levels: on a GPU a step per token is a launch per token."""
    x = jnp.concatenate([x[:, :1] + gates[:, :1] * start[:, None], x[:, 1:]], axis=1)
    h = lax.associative_scan(_join, (gates, x), axis=1)[1]
    return h, h[:, -1]


def _tree_backward(g: Array, g_final: Array, gates: Array) -> tuple[Array, Array]:
    """Return s_t and a_t s_t of all tokens."""
    g = jnp.concatenate([g[:, :-1], g[:, -1:] + g_final[:, None]], axis=1)
    following = jnp.concatenate([gates[:, 1:], jnp.ones_like(gates[:, :1])], axis=1)
    adjoint = lax.associative_scan(_join, (following, g), axis=1, reverse=True)[1]
    return adjoint, gates * adjoint


def _join(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
    return early[0] * late[0], late[0] * early[1] + late[1]
