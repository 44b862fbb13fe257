r"""Squared-kernel attention with decay ("2Mamba"): the weights are squares of scaled products.

y_t = Σ_{j≤t} (scale q_t·k_j)² e^{g_{j+1} + ... + g_t} v_j

Squares are never negative, so that weights can be normalised without a feature map, and a square is
a product of features, (q·k)² = φ(q)·φ(k), so that the state has a fixed size. A token reads itself
and those before it (causal).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmem.ops import linear_chunks, linear_reference
from jaxmem.ops.attention_terms import Places, cumulative
from jaxmem.ops.checks import as_arrays, check_precision, number_scale
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.linear_terms import (
    GroupRows,
    HeadRows,
    LinearState,
    LogDecay,
    Operands,
    SquaredOutput,
    check_chunk_size,
    default_chunk,
    few_tokens,
    is_empty,
    read_dtype,
    validate_operands,
    with_start,
)
from jaxmem.ops.platforms import Kernel, run_kernel
from jaxmem.ops.similarity import Pairs, similarity_sums
from jaxmem.shapes import RowInts, SegmentIds
from pallas_kernels import squared_attention as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import interpreted
from pallas_kernels.pairs import Decay, PairTiles

__all__ = ["SquaredOutput", "quadratic_is_shorter", "squared_attention", "squared_features"]


def squared_features(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """Return φ(x) with φ(x)·φ(y) = (x·y)²: products of two channels, F = K (K + 1) / 2.

    φ(x) = [c_ij x_i x_j for i ≤ j, row by row], c_ii = 1, c_ij = √2

    Reference: 2Mamba2Furious (arXiv 2602.17363), the symmetric form of its order-2 state.
    """
    first, second = np.triu_indices(x.shape[-1])
    factor = np.where(first == second, 1.0, np.sqrt(2.0)).astype(x.dtype)
    return x[..., first] * x[..., second] * factor


def feature_count(width: int) -> int:
    """Return how many features a vector of this width has."""
    return width * (width + 1) // 2


def quadratic_is_shorter(length: int, width: int) -> bool:
    """Return whether all pairs of tokens take less time than the state of chunks does.

    Pairs cost T (K + V) FLOPs per token and head, for those that are invisible are left out; chunks
    cost 2 C (K + V) + 4 F V with F = K (K + 1) / 2 features. At K = V that is equal at 2 (C + F)
    tokens. Features cost more time than their FLOPs: on a CPU, forward and backward, the times are
    equal at 870 and 2650 tokens for K = 16 and 32, which is 2.6 and 2.4 times as many.
    """
    return length < 5 * (default_chunk() + feature_count(width))


def squared_attention(
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
    config: PairTiles | None = None,
    interpret: bool | None = None,
) -> SquaredOutput:
    r"""Sum values with weights (scale q_t·k_j)² e^{g_{j+1} + ... + g_t} over the tokens j ≤ t.

    S_t = e^{g_t} S_{t-1} + φ(k_t) v_tᵀ,  y_t = φ(scale q_t)ᵀ S_t,  with `squared_features` φ

    y / total is 2Mamba's row-normalised form. Cost, per token and head: T (K + V) FLOPs forward
    over all pairs, or 2 C (K + V) + 2 K (K + 1) V in chunks of C, and about 2.5 times that
    backward.

    Args:
      q: queries; the H heads are G groups that share queries and keys, mostly of one head.
      k: keys.
      v: values; V may differ from K.
      scale: factor of the products, before the square; None: 1/sqrt(K). Products must be in the
        range of float32 before and after it; with a state so must be the squares of keys.
      log_decay: g, as in `linear_attention`; None: no decay.
      with_total: also return the sums of weights.
      initial_state: sums over earlier tokens, of K (K + 1) / 2 features; None: none. With a state
        the recurrence over features runs, whatever the length.
      segment_ids: as in `linear_attention`.
      initial_segment: as in `linear_attention`.
      implementation: `reference` is one step per token with features; `xla` takes all pairs, tile
        by tile, in rows that are short (`quadratic_is_shorter`), else chunks; `pallas` takes all
        pairs and no state, so that it cannot decode.
      chunk_size: tokens per chunk; speed and memory only. None: 32 on a CPU, else 128.
      precision: of the matrix products; None: JAX's default. Squares double a relative error.
      config: launch configuration of the kernel; None: that of the tables.
      interpret: run the kernel interpreted; None: where there is no GPU.

    Returns:
      y, the totals if asked for, and the state after the last token if one came in: sums over pairs
      leave none.

    Raises:
      ShapeError: shapes do not fit, heads or widths are none, or the state is of another call.
      DTypeError: an operand is not floating point, or documents are not integers.
      ConfigError: scale is not finite, or chunk_size not positive.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: 2Mamba2Furious (arXiv 2602.17363), `squared` kernels. Differs: upstream takes the
      maximum of signed products, and a floor of a denominator that depends on it. Over all pairs
      neither is needed, for no weight is negative and none of decaying tokens can overflow. In
      the recurrence total = φ(q)·z cancels where q is nearly orthogonal to the keys: its error is
      about eps |scale q|² Σ_j e^{g_{j+1} + ... + g_t} |k_j|² whatever the total is, and a negative
      one is returned as 0.
    """
    op = "squared_attention"
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
        features=feature_count(q.shape[-1]),
        log_decay=log_decay,
        with_total=with_total,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
    )
    options = {"initial_state": initial_state, "config": config}
    choice = resolve(op, implementation, q, k, v, interpret=interpret, **options)
    scale = number_scale(op, scale, q.shape[3])
    static = _Static(scale, with_total, chunk_size, precision, config, interpreted(interpret))
    if choice.kernel is not None and not is_empty(v):
        rows: Any = operands[:5]  # no state
        elsewhere = choice.plain is not None
        y, total = run_kernel(_KERNEL, static, *rows, elsewhere=elsewhere)
        return SquaredOutput(y.astype(read_dtype(v)), total if with_total else None, None)
    form = "reference" if choice.plain == "reference" else "xla"
    y, total, state = _plain_form(form, static, operands)
    state = None if initial_state is None else state
    return SquaredOutput(y.astype(read_dtype(v)), total if with_total else None, state)


def _kernel_unmet(
    q: Any,
    k: Any,
    v: Any,
    *,
    initial_state: LinearState | None = None,
    config: PairTiles | None = None,
) -> str | None:
    if initial_state is not None:
        return "it takes all pairs of tokens; with a state the recurrence runs, in chunks or steps"
    why = kernels.unmet(
        jnp.promote_types(q.dtype, k.dtype),
        v.dtype,
        q.shape[3],
        v.shape[3],
        length=q.shape[1],
        rows=v.shape[0] * v.shape[2],
        config=config,
    )
    return why or few_tokens(q.shape[1])


declare(squared_attention, pallas=_kernel_unmet, xla=None, reference=None)


class _Static(NamedTuple):
    """What a call does not trace."""

    scale: float
    with_total: bool
    chunk_size: int | None
    precision: Precision | None
    config: PairTiles | None
    interpret: bool

    @property
    def for_kernel(self) -> dict[str, Any]:
        """Options of the kernels."""
        names = ("scale", "precision", "config", "interpret")
        return {name: getattr(self, name) for name in names}


def _plain_form(
    form: str, static: _Static, operands: Operands
) -> tuple[Array, Array | None, LinearState | None]:
    """Take all pairs, or run the recurrence over features token by token or chunk by chunk."""
    length, width = operands.q.shape[1], operands.q.shape[3]
    short = isinstance(length, int) and quadratic_is_shorter(length, width)
    if form == "xla" and operands.state is None and short:
        pairs = Pairs(*_pairs(*operands[:4]), _places(operands.document))
        options: dict[str, Any] = {"scale": static.scale, "precision": static.precision}
        return *similarity_sums(jnp.square, pairs, in_row=True, **options), None
    operands = with_start(operands, feature_count(width), with_total=static.with_total)
    if form == "reference":
        y, total, state = linear_reference.run(operands, squared_features, static.scale)
    else:
        statics = (static.scale, static.chunk_size, static.precision)
        y, total, state = linear_chunks.run(
            operands, linear_chunks.Walk(2, squared_features, *statics)
        )
    if total is not None:
        total = jnp.where(total < 0.0, 0.0, total)  # rounding of a sum of squares
    return y, total, state


def _places(document: Array | None) -> Places | None:
    if document is None:
        return None
    index = jnp.broadcast_to(jnp.arange(document.shape[1]), document.shape)
    return Places(index, index, document + 1, document + 1)


def _pairs(
    q: Array, k: Array, v: Array, log_decay: Array | None
) -> tuple[Array, Array, Array, Decay | None]:
    """Return what the forms over all pairs take: queries and keys per head, and summed gates."""
    heads_per_group = v.shape[2] // q.shape[2]
    if heads_per_group > 1:
        q, k = jnp.repeat(q, heads_per_group, axis=2), jnp.repeat(k, heads_per_group, axis=2)
    decay = None
    if log_decay is not None:
        sums = tuple(jnp.moveaxis(a, 1, 2) for a in cumulative(log_decay))
        decay = Decay(*sums, *sums)
    return q, k, v, decay


def _forward(static: _Static, operands: tuple) -> tuple[tuple[Array, Array], tuple]:
    *rows, document = operands
    inputs = kernels.Operands(*_pairs(*rows), document)
    y, total = kernels.squared_forward(inputs, **static.for_kernel)
    return (y, total), ()


def _backward(static: _Static, operands: tuple, saved: tuple, grads: tuple) -> tuple:
    del saved
    *rows, document = operands
    pairs, pull = jax.vjp(_pairs, *rows)
    inputs = kernels.Operands(*pairs, document)
    gradients = kernels.squared_backward(inputs, kernels.Outputs(*grads), **static.for_kernel)
    return (*pull(gradients), None)


def _plain(static: _Static, operands: Any) -> tuple[Array, Array | None]:
    whole = Operands(*operands, state=None)
    y, total, _ = _plain_form("xla", static._replace(with_total=True), whole)
    return y, total


_KERNEL = Kernel("squared_attention", _forward, _backward, _plain)
