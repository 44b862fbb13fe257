"""What linear and squared attention share: their results, states, checks and document numbers."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.checks import (
    check_axes,
    check_documents,
    check_floating,
    check_precision,
    check_shape,
)
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import spans

CHUNK = 32
"""Tokens per chunk unless the caller says otherwise; measured best on a CPU at widths to 64."""


class LinearState(NamedTuple):
    """Sums over the tokens so far, in float32 or wider; F is the number of features of a key."""

    memory: Float[Array, "B H F V"]
    """Σ_j e^{g_{j+1} + ... + g_t} φ(k_j) v_jᵀ."""
    total: Float[Array, "B H F"] | None
    """The same sum without the values; None where totals are not asked for."""


class LinearRead(NamedTuple):
    """What linear and squared attention return."""

    y: Float[Array, "B T H V"]
    """Weighted sums of values in their dtype, but float32 for float16, whose range they leave."""
    total: Float[Array, "B T H"] | None
    """Sums of the weights in float32 or wider; None unless asked for."""
    state: LinearState | None
    """The state after the last token; None unless one came in."""


class Operands(NamedTuple):
    """Checked operands, with nothing in padding that could be written."""

    q: Array
    """[B T G K]"""
    k: Array
    """[B T G K]"""
    v: Array
    """[B T H V]"""
    log_decay: Array | None
    """[B T H] in float32 or wider, finite; 0 at padding and where a document starts."""
    document: Array | None
    """Number of the token's document, [B T] int32: 0 continues the state; padding the one before
    it."""
    state: LinearState | None

    @property
    def wide(self) -> Any:
        """The dtype of sums: float32 or wider."""
        return at_least_float32(self.q).dtype


def init_linear_state(
    batch: int, heads: int, features: int, width: int, *, with_total: bool, dtype: Any = None
) -> LinearState:
    """Return the state before any token: zeros, of float32 unless a wider dtype is asked for."""
    wide = jnp.promote_types(dtype or jnp.float32, jnp.float32)
    total = jnp.zeros((batch, heads, features), wide) if with_total else None
    return LinearState(jnp.zeros((batch, heads, features, width), wide), total)


def prepared(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    features: int,
    scale: float,
    log_decay: Array | None,
    with_total: bool,
    initial_state: LinearState | None,
    segment_ids: Array | None,
    initial_segment: Array | None,
    chunk_size: int | None,
    precision: Any,
) -> Operands:
    """Check a call and bring its operands into the form that all implementations take."""
    check_floating(op, q=q, k=k, v=v, log_decay=log_decay)
    _check_heads(op, q, k, v)
    _check_numbers(op, scale, chunk_size)
    check_precision(precision)
    check_documents(op, q.shape[:2], segment_ids, initial_segment)
    _check_state(op, initial_state, (v.shape[0], v.shape[2], features, v.shape[3]), with_total)
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k = q.astype(dtype), k.astype(dtype)
    wide = at_least_float32(q).dtype
    log_decay = _per_token(op, log_decay, v.shape[:3], wide)
    if initial_state is not None:
        total = initial_state.total
        memory = initial_state.memory.astype(wide)
        initial_state = LinearState(memory, None if total is None else total.astype(wide))
    if segment_ids is None:
        return Operands(q, k, v, log_decay, None, initial_state)
    rows = spans(segment_ids, initial_segment)
    real = rows.valid[..., None]
    if log_decay is not None:
        # A document's first gate has nothing to decay, so it may be anything too.
        log_decay = jnp.where(real & ~rows.reset[..., None], log_decay, 0.0)
    k, v = jnp.where(real[..., None], k, 0.0), jnp.where(real[..., None], v, 0.0)
    document = jnp.cumsum(rows.reset, axis=1, dtype=jnp.int32)
    return Operands(q, k, v, log_decay, document, initial_state)


def read_dtype(v: Array) -> Any:
    """Return the dtype of weighted sums of values."""
    return jnp.dtype(jnp.float32) if v.dtype == jnp.float16 else v.dtype


def _check_heads(op: str, q: Array, k: Array, v: Array) -> None:
    check_axes(op, "q", q, "B T G K")
    check_axes(op, "k", k, "B T G K")
    check_axes(op, "v", v, "B T H V")
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        raise ShapeError(
            f"{op}: q {q.shape}, k {k.shape}, v {v.shape} do not fit together. "
            "Expected q and k [B T G K] of one shape and v [B T H V] with H a multiple of G."
        )


def _check_numbers(op: str, scale: float, chunk_size: int | None) -> None:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"{op}: scale={scale!r} is not a finite Python number. Use K**-0.5, say.")
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"{op}: chunk_size={chunk_size} is not positive. Use {CHUNK}, or None.")


def _check_state(
    op: str, state: LinearState | None, memory: tuple[int, ...], with_total: bool
) -> None:
    if state is None:
        return
    check_floating(op, memory=state.memory, total=state.total)
    check_shape(op, "initial_state.memory", state.memory, memory, "sums per head")
    if (state.total is not None) != with_total:
        raise ShapeError(
            f"{op}: with_total={with_total}, but initial_state.total is "
            f"{'None' if state.total is None else 'given'}. Make the state for this call."
        )
    check_shape(op, "initial_state.total", state.total, memory[:3], "sums of features per head")


def _per_token(
    op: str, log_decay: Array | None, tokens: tuple[int, ...], dtype: Any
) -> Array | None:
    """Return finite decays [B T H]; those of [H] are the same for all tokens.

    -inf lets nothing through, but a difference of sums of it is NaN.
    """
    if log_decay is None:
        return None
    if log_decay.shape not in (tokens, tokens[2:]):
        raise ShapeError(
            f"{op}: log_decay has shape {log_decay.shape}. Pass one number per token and head, "
            f"shape {tokens}, or one per head, shape {tokens[2:]}."
        )
    return jnp.broadcast_to(jnp.maximum(log_decay.astype(dtype), lowest_gate(dtype)), tokens)


def lowest_gate(dtype: Any) -> float:
    """Return the logarithm of a gate that leaves nothing, however much the rest grows after it.

    Its exponential times the largest number of the dtype is still 0, and so is its gradient.
    """
    return 2.0 * math.log(jnp.finfo(dtype).smallest_subnormal)
