r"""Linear attention with or without decay: a matrix-valued state, read by queries.

S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,  y_t = scale q_tᵀ S_t

The core of linear attention (no decay), retention (a decay per head), gated linear attention with
a scalar gate and Mamba-2 (heads of a group share queries and keys).
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Float

from jaxmem.ops import linear_chunks, linear_reference
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.linear_terms import (
    CHUNK,
    LinearRead,
    LinearState,
    Operands,
    init_linear_state,
    prepared,
    read_dtype,
)
from jaxmem.shapes import HeadScalars, RowInts, SegmentIds
from pallas_kernels import linear_attention as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import interpreted
from pallas_kernels.linear_attention import LinearAttentionConfig

__all__ = ["LinearRead", "LinearState", "init_linear_state", "linear_attention"]

GroupRows = Float[Array, "B T G K"]
HeadRows = Float[Array, "B T H V"]
LogDecay = Float[Array, "B T H"] | HeadScalars


def linear_attention(
    q: GroupRows,
    k: GroupRows,
    v: HeadRows,
    *,
    scale: float = 1.0,
    log_decay: LogDecay | None = None,
    with_total: bool = False,
    initial_state: LinearState | None = None,
    segment_ids: SegmentIds | None = None,
    initial_segment: RowInts | None = None,
    implementation: Implementation = "auto",
    chunk_size: int | None = None,
    precision: Precision | None = None,
    config: LinearAttentionConfig | None = None,
    interpret: bool | None = None,
) -> LinearRead:
    r"""Sum values with weights scale q_t·k_j e^{g_{j+1} + ... + g_t} over the tokens j ≤ t.

    S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,  z_t = e^{g_t} z_{t-1} + k_t
    y_t = scale q_tᵀ S_t,  total_t = scale q_tᵀ z_t

    so that y / total is the normalised form. Cost, per token and head, in chunks of C:
    2 C (K + V) + 4 K V FLOPs forward and about 2.5 times that backward; nothing but the inputs and
    a state per chunk is kept. Sums are carried in float32 or wider.

    Args:
      q: queries; the H heads are G groups that share queries and keys (Mamba-2), H = G otherwise.
      k: keys.
      v: values; V may differ from K.
      scale: factor of the weights.
      log_decay: g, one number per token and head, or per head; None: no decay. Positive numbers
        grow the state, within the range of float32; -inf lets nothing through.
      with_total: also return the sums of weights.
      initial_state: sums over earlier tokens (`init_linear_state` for none); None: none, and none
        is returned.
      segment_ids: document of each token; the state starts anew with each. A padded token (id 0)
        is not written and decays nothing; it reads what the last real token before it could read.
        Its q must be finite; k, v and log_decay may hold anything there.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` a scan over chunks,
        `pallas` one walk forward and three backward.
      chunk_size: tokens per chunk of `xla`; speed and memory only. None: 32.
      precision: of the matrix products; None: JAX's default.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Raises:
      ShapeError: shapes do not fit, an axis is empty, or the state is of another call.
      DTypeError: an operand is not floating point.
      ConfigError: scale is not finite, or chunk_size not positive.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Katharopoulos et al. 2020 (arXiv 2006.16236), eqs. 16-20; Sun et al. 2023 (RetNet,
      arXiv 2307.08621), eq. 7; Dao and Gu 2024 (Mamba-2, arXiv 2405.21060), sec. 6.
    """
    operands = prepared(
        "linear_attention",
        q,
        k,
        v,
        features=q.shape[-1],
        scale=scale,
        log_decay=log_decay,
        with_total=with_total,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
        chunk_size=chunk_size,
        precision=precision,
    )
    form = resolve(
        "linear_attention", implementation, q, k, v, interpret=interpret, config=config
    ).implementation
    start = operands.state
    if start is None:
        batch, heads = v.shape[0], v.shape[2]
        start = init_linear_state(
            batch, heads, q.shape[3], v.shape[3], with_total=with_total, dtype=operands.wide
        )
    if form == "reference":
        y, total, state = linear_reference.run(operands, start, lambda x: x, scale)
    elif form == "xla":
        walk = linear_chunks.Walk(1, lambda x: x, scale, chunk_size or CHUNK, precision)
        y, total, state = linear_chunks.run(operands, start, walk)
    else:
        static = _Static(scale, precision, config, interpreted(interpret))
        found: Any = _kernel(static, operands._replace(state=start))
        y, total, state = found
    after = None if initial_state is None else state
    return LinearRead(y.astype(read_dtype(v)), total, after)


declare(linear_attention, pallas=kernels.unmet, xla=None, reference=None)


class _Static(NamedTuple):
    """What a call does not trace."""

    scale: float
    precision: Precision | None
    config: LinearAttentionConfig | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(static: _Static, operands: Operands) -> tuple[Array, Array | None, LinearState]:
    return _kernel_forward(static, operands)[0]


def _kernel_forward(static: _Static, operands: Operands) -> tuple[tuple, Operands]:
    run = functools.partial(kernels.linear_forward, **static._asdict())
    q, k, v, gates, document, start = operands
    state: Any = start
    found: Any = first_order("linear_attention", run)(q, k, v, gates, document, *state)
    y, total, *ends = found
    return (y, total, LinearState(*ends)), operands


def _kernel_backward(static: _Static, operands: Operands, grads: tuple) -> tuple[Operands]:
    run = functools.partial(kernels.linear_backward, **static._asdict())
    q, k, v, gates, document, start = operands
    state: Any = start
    dy, dtotal, dstate = grads
    all_operands = (q, k, v, gates, document, *state, dy, dtotal, *dstate)
    found: Any = first_order("linear_attention", run)(*all_operands)
    dq, dk, dv, dgates, *dstart = found
    return (Operands(dq, dk, dv, dgates, None, LinearState(*dstart)),)


_kernel.defvjp(_kernel_forward, _kernel_backward)
