r"""Squared-kernel attention with decay ("2Mamba"): the weights are squares of scaled products.

y_t = Σ_{j≤t} (scale q_t·k_j)² e^{g_{j+1} + ... + g_t} v_j

Squares are never negative, so that weights can be normalised without a feature map, and a square is
a product of features, (q·k)² = φ(q)·φ(k), so that the state has a fixed size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxmem.ops import linear_chunks, linear_reference
from jaxmem.ops.attention_terms import Places, cumulative
from jaxmem.ops.dispatch import Implementation, Slower, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.linear_attention import GroupRows, HeadRows, LogDecay
from jaxmem.ops.linear_terms import (
    CHUNK,
    LinearRead,
    LinearState,
    Operands,
    init_linear_state,
    prepared,
    read_dtype,
)
from jaxmem.ops.similarity import Pairs, similarity_sums
from jaxmem.shapes import RowInts, SegmentIds
from pallas_kernels import squared_attention as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._interpret import interpreted
from pallas_kernels.pairs import Decay, PairTiles

__all__ = ["quadratic_is_shorter", "squared_attention", "squared_features"]


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
    """Return whether all pairs of tokens cost less than the state of chunks does.

    Pairs cost T (K + V) FLOPs per token and head, for those that are invisible are left out; chunks
    cost 2 C (K + V) + 4 F V with F = K (K + 1) / 2 features. At K = V they break even at
    T = 2 (C + F).
    """
    return length < 2 * (CHUNK + feature_count(width))


def squared_attention(
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
    config: PairTiles | None = None,
    interpret: bool | None = None,
) -> LinearRead:
    r"""Sum values with weights (scale q_t·k_j)² e^{g_{j+1} + ... + g_t} over the tokens j ≤ t.

    S_t = e^{g_t} S_{t-1} + φ(k_t) v_tᵀ,  y_t = φ(scale q_t)ᵀ S_t,  with `squared_features` φ

    y / total is 2Mamba's row-normalised form. Cost, per token and head: T (K + V) FLOPs forward
    over all pairs, or 2 C (K + V) + 2 K (K + 1) V in chunks of C, and about 2.5 times that
    backward.

    Args:
      q: queries; the H heads are G groups that share queries and keys, mostly of one head.
      k: keys.
      v: values; V may differ from K.
      scale: factor of the products, before the square.
      log_decay: g, as in `linear_attention`; None: no decay.
      with_total: also return the sums of weights.
      initial_state: sums over earlier tokens, of K (K + 1) / 2 features; None: none, and none is
        returned. With a state the recurrence over features runs, whatever the length.
      segment_ids: as in `linear_attention`.
      initial_segment: as in `linear_attention`.
      implementation: `reference` is one step per token with features; `xla` takes all pairs, block
        by block, in rows that are short (`quadratic_is_shorter`), else chunks; `pallas` names the
        kernel over all pairs for rows that are read at once. It has no state, so that with one, as
        in decoding, this name means what `auto` does, chunks in XLA; `explain` says so.
      chunk_size: tokens per chunk; speed and memory only. None: 32.
      precision: of the matrix products; None: JAX's default. Squares double a relative error.
      config: launch configuration of the kernel; None: that of the tables.
      interpret: run the kernel interpreted; None: where there is no GPU.

    Raises:
      ShapeError: shapes do not fit, an axis is empty, or the state is of another call.
      DTypeError: an operand is not floating point.
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
    operands = prepared(
        "squared_attention",
        q,
        k,
        v,
        features=feature_count(q.shape[-1]),
        scale=scale,
        log_decay=log_decay,
        with_total=with_total,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
        chunk_size=chunk_size,
        precision=precision,
    )
    # The kernel's name is for rows read at once; `auto` tells `explain` why it is not taken here.
    asked = "auto" if implementation == "pallas" and initial_state is not None else implementation
    options = {"initial_state": initial_state, "config": config}
    form = resolve(
        "squared_attention", asked, q, k, v, interpret=interpret, **options
    ).implementation
    if form == "pallas":
        static = _Static(scale, precision, config, interpreted(interpret))
        found: Any = _kernel(static, *_pairs(operands))
        y, total = found
    elif form == "xla" and initial_state is None and quadratic_is_shorter(q.shape[1], q.shape[3]):
        pairs = Pairs(*_pairs(operands)[:4], _places(operands.document))
        options = {"scale": scale, "precision": precision}
        y, total = similarity_sums(jnp.square, pairs, in_row=True, **options)
    else:
        return _with_state(form, operands, with_total, scale, chunk_size, precision)
    return LinearRead(y.astype(read_dtype(v)), total if with_total else None, None)


def _pallas_unmet(
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
    if why is None and not quadratic_is_shorter(q.shape[1], q.shape[3]):
        return Slower(f"rows of {q.shape[1]} tokens are less work in chunks")
    return why


declare(squared_attention, pallas=_pallas_unmet, xla=None, reference=None)


def _places(document: Array | None) -> Places | None:
    if document is None:
        return None
    index = jnp.broadcast_to(jnp.arange(document.shape[1]), document.shape)
    return Places(index, index, document + 1, document + 1)


def _with_state(
    form: str,
    operands: Operands,
    with_total: bool,
    scale: float,
    chunk_size: int | None,
    precision: Precision | None,
) -> LinearRead:
    """Run the recurrence over features, token by token or chunk by chunk."""
    start, v = operands.state, operands.v
    if start is None:
        shape = (v.shape[0], v.shape[2], feature_count(operands.q.shape[3]), v.shape[3])
        start = init_linear_state(*shape, with_total=with_total, dtype=operands.wide)
    if form == "reference":
        y, total, state = linear_reference.run(operands, start, squared_features, scale)
    else:
        walk = linear_chunks.Walk(2, squared_features, scale, chunk_size or CHUNK, precision)
        y, total, state = linear_chunks.run(operands, start, walk)
    if total is not None:
        total = jnp.where(total < 0.0, 0.0, total)  # rounding of a sum of squares
    return LinearRead(y.astype(read_dtype(v)), total, None if operands.state is None else state)


class _Rows(NamedTuple):
    """Operands of the forms over all pairs, with queries and keys of every head."""

    q: Array
    k: Array
    v: Array
    decay: Decay | None
    document: Array | None


def _pairs(operands: Operands) -> _Rows:
    share = operands.v.shape[2] // operands.q.shape[2]
    q, k = operands.q, operands.k
    if share > 1:
        q, k = jnp.repeat(q, share, axis=2), jnp.repeat(k, share, axis=2)
    decay = None
    if operands.log_decay is not None:
        sums = tuple(jnp.moveaxis(a, 1, 2) for a in cumulative(operands.log_decay))
        decay = Decay(*sums, *sums)
    return _Rows(q, k, operands.v, decay, operands.document)


class _Static(NamedTuple):
    """What a call does not trace."""

    scale: float
    precision: Precision | None
    config: PairTiles | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(
    static: _Static, q: Array, k: Array, v: Array, decay: Decay | None, document: Array | None
) -> tuple[Array, Array]:
    return _kernel_forward(static, q, k, v, decay, document)[0]


def _kernel_forward(static: _Static, *operands: Any) -> tuple[tuple[Array, Array], _Rows]:
    run = functools.partial(kernels.squared_forward, **static._asdict())
    return first_order("squared_attention", run)(*operands), _Rows(*operands)


def _kernel_backward(static: _Static, rows: _Rows, grads: tuple[Array, Array]) -> tuple:
    run = functools.partial(kernels.squared_backward, **static._asdict())
    operands = (*rows, *grads)
    gradients: Any = first_order("squared_attention", run)(*operands)
    dq, dk, dv, at_queries, at_keys = gradients
    decay = None
    if rows.decay is not None:
        rest = jnp.zeros_like(at_queries)
        decay = Decay(at_queries, rest, at_keys, rest)
    return dq, dk, dv, decay, None


_kernel.defvjp(_kernel_forward, _kernel_backward)
