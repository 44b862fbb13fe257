"""What linear and squared attention share: their results, states, checks and document numbers."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.checks import check_axes, check_documents, check_floating, check_shape
from jaxmem.ops.dispatch import Slower
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import spans
from jaxmem.shapes import HeadScalars
from pallas_kernels._interpret import on_cpu

CPU_CHUNK = 32
"""Tokens per chunk on a CPU, where it was measured best at widths to 64."""
GPU_CHUNK = 128
"""Tokens per chunk on a GPU, whose products need larger operands; not measured on a device yet."""
FEW_TOKENS = 16
"""Most tokens of a call that counts as decoding; kernels are made for rows of many."""

GroupRows = Float[Array, "B T G K"]
HeadRows = Float[Array, "B T H V"]
LogDecay = Float[Array, "B T H"] | HeadScalars


class LinearState(NamedTuple):
    """Sums over the tokens so far, in float32 or wider; F is the number of features of a key."""

    memory: Float[Array, "B H F V"]
    """Σ_j e^{g_{j+1} + ... + g_t} φ(k_j) v_jᵀ."""
    total: Float[Array, "B H F"] | None
    """The same sum without the values; None where totals are not asked for."""


class LinearOutput(NamedTuple):
    """What `linear_attention` returns."""

    y: Float[Array, "B T H V"]
    """Weighted sums of values in their dtype, but float32 for float16, whose range they leave."""
    total: Float[Array, "B T H"] | None
    """Sums of the weights in float32 or wider; None unless asked for."""
    state: LinearState
    """The state after the last token."""


class SquaredOutput(NamedTuple):
    """What `squared_attention` returns."""

    y: Float[Array, "B T H V"]
    """Weighted sums of values in their dtype, but float32 for float16, whose range they leave."""
    total: Float[Array, "B T H"] | None
    """Sums of the weights in float32 or wider; None unless asked for."""
    state: LinearState | None
    """The state after the last token; None unless one came in: all pairs of tokens have none."""


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

    @property
    def heads_per_group(self) -> int:
        """Heads that share queries and keys."""
        return self.v.shape[2] // self.q.shape[2]


def init_linear_state(
    batch: int, heads: int, features: int, width: int, *, with_total: bool, dtype: Any = None
) -> LinearState:
    """Return the state before any token: zeros, of float32 unless a wider dtype is asked for."""
    wide = jnp.promote_types(dtype or jnp.float32, jnp.float32)
    total = jnp.zeros((batch, heads, features), wide) if with_total else None
    return LinearState(jnp.zeros((batch, heads, features, width), wide), total)


def with_start(operands: Operands, features: int, *, with_total: bool) -> Operands:
    """Return the operands with a state, that before any token if there is none."""
    if operands.state is not None:
        return operands
    batch, _, heads, width = operands.v.shape
    options = {"with_total": with_total, "dtype": operands.wide}
    return operands._replace(state=init_linear_state(batch, heads, features, width, **options))


def validate_operands(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    features: int,
    log_decay: Array | None,
    with_total: bool,
    initial_state: LinearState | None,
    segment_ids: Array | None,
    initial_segment: Array | None,
) -> Operands:
    """Check a call and bring its operands into the form that all implementations take."""
    _check_rows(op, q, k, v, log_decay)
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
    # Without a token there are no documents, and `spans` needs a first one.
    if segment_ids is None or _is_zero(q.shape[1]):
        return Operands(q, k, v, log_decay, None, initial_state)
    rows = spans(segment_ids, initial_segment)
    real = rows.valid[..., None]
    if log_decay is not None:
        # A document's first gate has nothing to decay, so it may be anything too.
        log_decay = jnp.where(real & ~rows.reset[..., None], log_decay, 0.0)
    k, v = jnp.where(real[..., None], k, 0.0), jnp.where(real[..., None], v, 0.0)
    document = jnp.cumsum(rows.reset, axis=1, dtype=jnp.int32)
    return Operands(q, k, v, log_decay, document, initial_state)


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """Check the number of tokens per chunk; None is the default.

    Raises:
      ConfigError: it is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(
            f"{op}: chunk_size={chunk_size} is not positive. Use {CPU_CHUNK}, or None."
        )


def default_chunk() -> int:
    """Return the tokens per chunk where the caller does not say."""
    return CPU_CHUNK if on_cpu() else GPU_CHUNK


def read_dtype(v: Array) -> Any:
    """Return the dtype of weighted sums of values."""
    return jnp.dtype(jnp.float32) if v.dtype == jnp.float16 else v.dtype


def is_empty(rows: Array) -> bool:
    """Return whether there is no row or no token [B T ...]."""
    return any(_is_zero(size) for size in rows.shape[:2])


def few_tokens(length: int) -> Slower | None:
    """Say that a call decodes, for which a kernel over long rows is not made, or None."""
    if length > FEW_TOKENS:
        return None
    return Slower(f"{length} tokens decode, and the kernel is made for rows of many")


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _check_rows(op: str, q: Array, k: Array, v: Array, log_decay: Array | None) -> None:
    check_floating(op, q=q, k=k, v=v, log_decay=log_decay)
    check_axes(op, "q", q, "B T G K")
    check_axes(op, "k", k, "B T G K")
    check_axes(op, "v", v, "B T H V")
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        raise ShapeError(
            f"{op}: q {q.shape}, k {k.shape}, v {v.shape} do not fit together. "
            "Expected q and k [B T G K] of one shape and v [B T H V] with H a multiple of G."
        )


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
    """Return finite decays [B T H]; those of [H] are the same for all tokens."""
    if log_decay is None:
        return None
    if log_decay.shape not in (tokens, tokens[2:]):
        raise ShapeError(
            f"{op}: log_decay has shape {log_decay.shape}. Pass one number per token and head, "
            f"shape {tokens}, or one per head, shape {tokens[2:]}."
        )
    return jnp.broadcast_to(finite_gates(log_decay, dtype), tokens)


def finite_gates(gates: Array, dtype: Any) -> Array:
    """Return logarithms of gates, those beyond any float brought to where sums of them are exact.

    Infinity lets nothing, or everything, through, but a difference of sums of it is NaN; and a huge
    gate takes the digits of the weak ones beside it, which may belong to another document. The
    exponential of the least gate times the largest number is still 0, and so is its gradient.
    """
    least = 2.0 * math.log(jnp.finfo(dtype).smallest_subnormal)
    return jnp.clip(gates.astype(dtype), least, -least)
