r"""Linear attention with or without decay: a matrix-valued state, read by queries.

S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,  y_t = scale q_tᵀ S_t

A token reads itself and those before it (causal). This is the core of linear attention (no decay),
retention (a decay per head), gated linear attention with a scalar gate and Mamba-2 (heads of a
group share queries and keys).
"""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jaxmem.ops import linear_chunks, linear_reference
from jaxmem.ops.checks import as_arrays, check_precision, number_scale
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.linear_terms import (
    GroupRows,
    HeadRows,
    LinearOutput,
    LinearState,
    LogDecay,
    Operands,
    check_chunk_size,
    few_tokens,
    init_linear_state,
    is_empty,
    read_dtype,
    validate_operands,
    with_start,
)
from jaxmem.ops.platforms import Kernel, run_kernel
from jaxmem.shapes import RowInts, SegmentIds
from pallas_kernels import linear_attention as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import interpreted
from pallas_kernels.linear_attention import LinearAttentionConfig

__all__ = ["LinearOutput", "LinearState", "init_linear_state", "linear_attention"]


def linear_attention(
    q: GroupRows,
    k: GroupRows,
    v: HeadRows,
    *,
    scale: float | np.number | None = None,
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
) -> LinearOutput:
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
      scale: factor of the weights; None: 1/sqrt(K). Products of queries with keys and with states
        must be in the range of float32 before and after it.
      log_decay: g, one number per token and head, or per head; None: no decay. Positive numbers
        grow the state, within the range of float32; -inf lets nothing through.
      with_total: also return the sums of weights.
      initial_state: sums over earlier tokens; None: none, as `init_linear_state` returns.
      segment_ids: document of each token; the state starts anew with each. A padded token (id 0)
        is not written and decays nothing; it reads what the last real token before it could read.
        Its q must be finite; k, v and log_decay may hold anything there.
      initial_segment: document that `initial_state` belongs to; None: each row's first document.
      implementation: `reference` is one step of a `lax.scan` per token, `xla` a scan over chunks,
        `pallas` one walk forward and three backward, for rows of more than 16 tokens unless named.
      chunk_size: tokens per chunk of `xla`; speed and memory only. None: 32 on a CPU, else 128.
      precision: of the matrix products; None: JAX's default.
      config: launch configuration of the kernels; None: that of the tables.
      interpret: run kernels interpreted; None: where there is no GPU.

    Returns:
      y, the totals if asked for, and always the state after the last token.

    Raises:
      ShapeError: shapes do not fit, heads or widths are none, or the state is of another call.
      DTypeError: an operand is not floating point, or documents are not integers.
      ConfigError: scale is not finite, or chunk_size not positive.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Katharopoulos et al. 2020 (arXiv 2006.16236), eqs. 16-20; Sun et al. 2023 (RetNet,
      arXiv 2307.08621), eq. 7; Dao and Gu 2024 (Mamba-2, arXiv 2405.21060), sec. 6.
    """
    op = "linear_attention"
    q, k, v, log_decay, initial_state, segment_ids, initial_segment = as_arrays(
        q, k, v, log_decay, initial_state, segment_ids, initial_segment
    )
    check_chunk_size(op, chunk_size)
    check_precision(precision)
    operands = validate_operands(
        op,
        q,
        k,
        v,
        features=q.shape[-1],
        log_decay=log_decay,
        with_total=with_total,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
    )
    operands = with_start(operands, q.shape[3], with_total=with_total)
    choice = resolve(op, implementation, q, k, v, interpret=interpret, config=config)
    scale = number_scale(op, scale, q.shape[3])
    static = _Static(scale, chunk_size, precision, config, interpreted(interpret))
    if choice.kernel is not None and not is_empty(v):
        elsewhere = choice.plain is not None
        output: Any = run_kernel(_KERNEL, static, *operands, elsewhere=elsewhere)
    elif choice.plain == "reference":
        output = linear_reference.run(operands, _features, scale)
    else:
        output = _plain(static, operands)
    y, total, state = output
    return LinearOutput(y.astype(read_dtype(v)), total, state)


def _kernel_unmet(
    q: Any, k: Any, v: Any, *, config: LinearAttentionConfig | None = None
) -> str | None:
    return kernels.unmet(q, k, v, config=config) or few_tokens(q.shape[1])


declare(linear_attention, pallas=_kernel_unmet, xla=None, reference=None)


class _Static(NamedTuple):
    """What a call does not trace."""

    scale: float
    chunk_size: int | None
    precision: Precision | None
    config: LinearAttentionConfig | None
    interpret: bool

    @property
    def for_kernel(self) -> dict[str, Any]:
        """Options of the kernels."""
        options = self._asdict()
        del options["chunk_size"]
        return options


def _features(x: Array) -> Array:
    return x


def _plain(static: _Static, operands: Any) -> tuple[Array, Array | None, LinearState]:
    walk = linear_chunks.Walk(1, _features, static.scale, static.chunk_size, static.precision)
    return linear_chunks.run(Operands(*operands), walk)


def _of_kernel(operands: tuple) -> kernels.Operands:
    q, k, v, log_decay, document, state = operands
    return kernels.Operands(q, k, v, log_decay, document, *state)


def _forward(static: _Static, operands: tuple) -> tuple[tuple, tuple]:
    y, total, *state = kernels.linear_forward(_of_kernel(operands), **static.for_kernel)
    return (y, total, LinearState(*state)), ()


def _backward(static: _Static, operands: tuple, saved: tuple, grads: tuple) -> tuple:
    del saved
    dy, dtotal, dstate = grads
    outputs = kernels.Outputs(dy, dtotal, *dstate)
    gradients = kernels.linear_backward(_of_kernel(operands), outputs, **static.for_kernel)
    *rows, dmemory, dkey_sum = gradients
    return (*rows, LinearState(dmemory, dkey_sum))


_KERNEL = Kernel("linear_attention", _forward, _backward, _plain)
