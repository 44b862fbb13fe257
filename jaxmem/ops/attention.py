"""Softmax attention with a visibility rule: causal, lagged, windowed, packed, or over a cache.

Key j is visible to query i when it is at least `lag` and fewer than `window` places behind it in
the same document. With lag 0 this is causal self-attention; with lag 1, keys as queries and
look-ahead values it is the contextual memory of Memory Mosaics. A query that sees no key returns 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmem.errors import ShapeError
from jaxmem.ops import (
    attention_blocked,
    attention_cudnn,
    attention_reference,
    attention_xla,
)
from jaxmem.ops.attention_terms import (
    LOWEST_GATE,
    Dropout,
    Extras,
    Places,
    Rule,
    gates_at,
    places_in_row,
)
from jaxmem.ops.attention_xla import Gradients, OfForget, Read, cotangents, delta_of
from jaxmem.ops.checks import (
    active_dropout,
    check_axes,
    check_clamp,
    check_documents,
    check_floating,
    check_precision,
    check_shape,
    logit_scale,
)
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import HeadScalars, Queries, SegmentIds
from pallas_kernels import attention as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._dropout import dropout_seed
from pallas_kernels._interpret import interpreted
from pallas_kernels._tiles import LOG2_E
from pallas_kernels.pairs import FAR, Decay, PairTiles

__all__ = ["Dropout", "Places", "attention", "attention_with_lse", "places_in_row"]

GroupKeys = Float[Array, "B S G K"]
GroupValues = Float[Array, "B S G V"]
LogForget = Float[Array, "B S H"]
ValueGate = Float[Array, "B S H"]


def attention(
    q: Queries,
    k: GroupKeys,
    v: GroupValues,
    *,
    scale: float | HeadScalars,
    lag: int = 0,
    window: int | None = None,
    segment_ids: SegmentIds | None = None,
    places: Places | None = None,
    log_forget: LogForget | None = None,
    clamp: float | None = None,
    value_gate: ValueGate | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H V"]:
    r"""Average values with softmax weights over the visible keys.

    y_i = Σ_j softmax_j(min(scale q_i·k_j, clamp) + Σ_{j<l≤i} log_forget_l) value_gate_j v_j over
    the j of i's document with lag <= place_i - place_j < window

    Logits and weights are float32 or wider. Cost: 2 H (K + V) FLOPs forward and 2.5 times that
    backward per visible pair. Kept for the backward pass: the operands, y and a number per query
    and head; weights that are few too (`attention_xla.fits_at_once`).

    Args:
      q: queries.
      k: keys; may be wider than the values where a large scale would magnify their rounding. Query
        head h reads key/value head h // (H / G).
      v: values; their dtype is that of the result.
      scale: factor of the logits, one number or one per head. What float32 rounds of q·k counts
        `scale` times: weights and y have a relative error of about 6e-8 |scale q·k|, gradients of q
        and k that times scale. From e^16 on the nearest of close keys is lost; all stays finite.
      lag: how many places a key must be behind the query; 0 includes the query's own place.
      window: how many places back keys are visible, the query's own counted, any number; None:
        all.
      segment_ids: document of each token of rows that attend to themselves; 0 is padding, which
        is not seen and counts neither in distances nor with its gates. What q, k, v and value_gate
        hold there must be finite.
      places: places and documents where queries and keys are not one row of tokens. Without them
        T = S; with every query placed after every key all keys are visible.
      log_forget: log of the share of what came before that each key's token lets through, of any
        sign (above 0 older keys gain), per query head. Below -1024 it counts as -1024 and gets no
        gradient; so -inf is the limit of low gates, and a query that sees only keys before one
        still reads these. With `places`, all stand in the slot of their place.
      clamp: largest scale q·k, any finite number; what exceeds it counts as it, and passes no
        gradient. None: unbounded.
      value_gate: factor of the values that each query head reads, of any sign. The softmax does
        not see it: its weights sum to 1 without it. None: 1.
      dropout: rate and key of the dropout of the weights; None in evaluation. Which weights are
        dropped does not depend on the implementation.
      implementation: `reference` walks over queries with a `lax.scan`; `xla` takes all at once or,
        if these are many, tile by tile; `pallas` keeps tiles on chip; `cudnn` is cuDNN, for plain
        causal calls in half precision.
      precision: of float32 products; None: the fastest for values and gradients, and close to
        float32 for logits.
      config: tiles of the kernels; None: those of the table.
      interpret: run kernels interpreted; None: where there is no GPU.

    Raises:
      ShapeError: shapes do not fit, an axis is empty, or no distance is within `lag` and `window`.
      DTypeError: q, k, v, scale, log_forget or value_gate are not floating point.
      ConfigError: the rate of the dropout is not in [0, 1), or clamp is not a finite number.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call, or a second derivative of
        `pallas` is asked for.

    Reference: Vaswani et al. 2017, eq. 1; Memory Mosaics (arXiv 2405.06394), eq. 4 (lag 1, q = k);
      Forgetting Transformer (arXiv 2503.02130), eq. 5; FlashAttention-2 (arXiv 2307.08691); clamp
      and value_gate: `gated_softmax` of Mongaras and Larson's softmax attention as a recurrent
      network (arXiv 2507.23632), whose denominators follow from the log-sum-exp.
    """
    return _attend(
        q,
        k,
        v,
        scale=scale,
        lag=lag,
        window=window,
        segment_ids=segment_ids,
        places=places,
        log_forget=log_forget,
        clamp=clamp,
        value_gate=value_gate,
        dropout=dropout,
        implementation=implementation,
        precision=precision,
        config=config,
        interpret=interpret,
        wants_lse=False,
    ).y


def attention_with_lse(
    q: Queries,
    k: GroupKeys,
    v: GroupValues,
    *,
    scale: float | HeadScalars,
    lag: int = 0,
    window: int | None = None,
    segment_ids: SegmentIds | None = None,
    places: Places | None = None,
    log_forget: LogForget | None = None,
    clamp: float | None = None,
    value_gate: ValueGate | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
    config: PairTiles | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Return what `attention` returns and the log-sum-exp of each query's logits.

    lse_i = log Σ_j exp(min(scale q_i·k_j, clamp) + Σ_{j<l≤i} log_forget_l)

    The latter is float32 or wider, before dropout and value_gate, -inf where no key is visible, and
    differentiable too. Reads of two sets of keys merge with it: exp(lse - lse_both) y summed over
    both. exp(lse) y is the sum without a denominator, to be divided by any other
    (arXiv 2507.23632). Arguments and errors are those of `attention`; cuDNN does not give it.
    """
    read = _attend(
        q,
        k,
        v,
        scale=scale,
        lag=lag,
        window=window,
        segment_ids=segment_ids,
        places=places,
        log_forget=log_forget,
        clamp=clamp,
        value_gate=value_gate,
        dropout=dropout,
        implementation=implementation,
        precision=precision,
        config=config,
        interpret=interpret,
        wants_lse=True,
    )
    return read.y, jnp.moveaxis(read.lse, 1, 2)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | Array,
    lag: int,
    window: int | None,
    segment_ids: Array | None,
    places: Places | None,
    log_forget: Array | None,
    clamp: float | None,
    value_gate: Array | None,
    dropout: Dropout | None,
    implementation: Implementation,
    precision: Precision | None,
    config: PairTiles | None,
    interpret: bool | None,
    wants_lse: bool,
) -> Read:
    _check_operands(q, k, v, scale, log_forget=log_forget, value_gate=value_gate)
    check_clamp("attention", clamp)
    _check_visibility(q, k, lag, window, segment_ids, places)
    check_precision(precision)
    lag, window = _distances(lag, window, FAR if places is not None else q.shape[1])
    dropout = active_dropout("attention", dropout)
    if log_forget is not None:
        log_forget = jnp.maximum(log_forget, LOWEST_GATE)
    if segment_ids is not None:
        places = places_in_row(segment_ids)
        if log_forget is not None:
            log_forget = jnp.where((segment_ids != 0)[..., None], log_forget, 0.0)
    # Gates are summed over slots: a row's tokens stand in theirs, other queries at their places.
    slots = None if segment_ids is not None or places is None else places.query
    form = resolve(
        "attention",
        implementation,
        q,
        k,
        v,
        scale=scale,
        lag=lag,
        window=window,
        places=places,
        log_forget=log_forget,
        clamp=clamp,
        value_gate=value_gate,
        dropout=dropout,
        config=config,
        wants_lse=wants_lse,
        interpret=interpret,
    ).implementation
    if form == "cudnn":
        y = attention_cudnn.run(q, k, v, scale=float(scale), window=window)
        return Read(y, jnp.zeros(()))
    rate, clamp = 0.0 if dropout is None else dropout.rate, None if clamp is None else float(clamp)
    rule = Rule(lag, window, rate, precision, clamp)
    static = _Static(form, rule, config, interpreted(interpret))
    seed = None if dropout is None else dropout_seed(dropout.key)
    return _read_as(static, q, k, v, scale, places, slots, log_forget, value_gate, seed)


def _read_as(
    static: "_Static",
    q: Array,
    k: Array,
    v: Array,
    scale: float | Array,
    places: Places | None,
    slots: Array | None,
    log_forget: Array | None,
    value_gate: Array | None,
    seed: Array | None,
) -> Read:
    """Bring the operands of a checked call into the form that its implementation takes."""
    form, rule = static.form, static.rule
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k = q.astype(dtype), k.astype(dtype)
    scale = jnp.broadcast_to(jnp.asarray(scale, at_least_float32(q).dtype), q.shape[2:3])
    gate = None if value_gate is None else jnp.moveaxis(value_gate.astype(scale.dtype), 1, 2)
    if form == "reference":
        return attention_reference.read(rule, q, k, v, scale, places, slots, log_forget, gate, seed)
    decay = None if log_forget is None else gates_at(log_forget.astype(scale.dtype), slots)
    extras = Extras(places, decay, gate, seed)
    if form == "xla" and attention_xla.fits_at_once(q, k):
        return attention_xla.at_once(rule, q, k, v, scale, extras)
    return _read(static, q, k, v, scale, extras)


def _check_operands(
    q: Array, k: Array, v: Array, scale: float | Array, **gates: Array | None
) -> None:
    op = "attention"
    check_floating(op, q=q, k=k, v=v, scale=scale, **gates)
    check_axes(op, "q", q, "B T H K")
    check_axes(op, "k", k, "B S G K")
    check_axes(op, "v", v, "B S G V")
    heads = q.shape[2]
    if (
        (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
        or k.shape[:3] != v.shape[:3]
        or heads % k.shape[2]
    ):
        raise ShapeError(
            f"{op}: q {q.shape}, k {k.shape}, v {v.shape} do not fit together. "
            "Expected q [B T H K], k [B S G K], v [B S G V] with H a multiple of G."
        )
    logit_scale(op, scale, heads, q.shape[3])
    for name, gate in gates.items():
        check_shape(op, name, gate, (*k.shape[:2], heads), "one gate per key and query head")


def _check_visibility(
    q: Array,
    k: Array,
    lag: int,
    window: int | None,
    segment_ids: Array | None,
    places: Places | None,
) -> None:
    op, queries, keys = "attention", q.shape[:2], k.shape[:2]
    if lag < 0 or (window is not None and window <= lag):
        raise ShapeError(
            f"{op}: with lag={lag} and window={window} the first visible key is not behind "
            "the last. Use 0 <= lag < window."
        )
    if places is None and queries != keys:
        raise ShapeError(
            f"{op}: {queries[1]} queries and {keys[1]} keys without `places`. "
            "Say where each stands, or pass rows of equal length."
        )
    check_documents(op, queries, segment_ids)
    if places is None:
        return
    if segment_ids is not None:
        raise ShapeError(f"{op}: both `places` and `segment_ids`. Places hold documents too.")
    for name, expected in zip(Places._fields, (queries, keys, queries, keys), strict=True):
        what = f"one number per {'query' if expected is queries else 'key'}"
        check_shape(op, f"places.{name}", getattr(places, name), expected, what)


def _distances(lag: int, window: int | None, distances: int) -> tuple[int, int | None]:
    """Return a rule that is the same for places fewer than `distances` apart, in small numbers."""
    everything = window is None or window >= distances
    return min(lag, distances), None if everything else int(window)


def _pallas_unmet(
    q: Any, k: Any, v: Any, *, config: PairTiles | None = None, **_: Any
) -> str | None:
    return kernels.unmet(
        jnp.promote_types(q.dtype, k.dtype),
        v.dtype,
        q.shape[3],
        v.shape[3],
        length=k.shape[1],
        rows=q.shape[0] * q.shape[2],
        config=config,
    )


def _cudnn_unmet(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any = 1.0,
    lag: int = 0,
    window: int | None = None,
    wants_lse: bool = False,
    **extras: Any,
) -> str | None:
    names = ("places", "log_forget", "clamp", "value_gate", "dropout")
    present = [n for n in names if extras.get(n) is not None]
    if lag != 0 or wants_lse or present:
        present = ["places or segment_ids" if n == "places" else n for n in present]
        found = [*present, *(["lag"] if lag else []), *(["log-sum-exp"] if wants_lse else [])]
        return f"it has no {', '.join(found)}"
    return attention_cudnn.unmet(q, k, v, scale=scale, window=window)


declare(attention, cudnn=_cudnn_unmet, pallas=_pallas_unmet, xla=None, reference=None)


class _Static(NamedTuple):
    """What a call does not trace."""

    form: str
    rule: Rule
    config: PairTiles | None
    interpret: bool


class _Residuals(NamedTuple):
    """Enough for every backward pass, whichever implementation ran forward."""

    q: Array
    k: Array
    v: Array
    scale: Array
    extras: Extras
    read: Read
    """Of a kernel, with the log-sum-exp in units of log 2."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(static: _Static, q: Array, k: Array, v: Array, scale: Array, extras: Extras) -> Read:
    """Attend without the weights of (T, S) in memory, forwards or backwards."""
    return _read_forward(static, q, k, v, scale, extras)[0]


def _read_forward(
    static: _Static, q: Array, k: Array, v: Array, scale: Array, extras: Extras
) -> tuple[Read, _Residuals]:
    if static.form == "xla":
        read = attention_blocked.forward(static.rule, q, k, v, scale, extras)
    else:
        run = functools.partial(kernels.forward, **_launch(static, q, k, v))
        y, lse = first_order("attention", run)(q, k, v, scale, *_for_kernels(extras))
        # The kernels count in units of log 2, from one pass to the other too.
        return Read(y, lse / LOG2_E), _Residuals(q, k, v, scale, extras, Read(y, lse))
    return read, _Residuals(q, k, v, scale, extras, read)


def _read_backward(static: _Static, residuals: _Residuals, grad: Read) -> tuple:
    q, k, v, scale, extras, read = residuals
    if static.form == "xla":
        grads = attention_blocked.backward(static.rule, q, k, v, scale, extras, read, grad)
    else:
        options = _launch(static, q, k, v)
        operands = (q, k, v, scale, *_for_kernels(extras), read.lse)
        operands = (*operands, grad.y.astype(v.dtype), delta_of(read, grad))
        run = functools.partial(_kernel_gradients, **options)
        grads = first_order("attention", run)(*operands)
    return cotangents(grads, q, k, v)


_read.defvjp(_read_forward, _read_backward)


def _kernel_gradients(*operands: Any, **options: Any) -> Gradients:
    dq, along, at_queries = kernels.queries_gradient(*operands, **options)
    dk, dv, at_keys, gate = kernels.keys_gradient(*operands, **options)
    forget = None
    if at_queries is not None and at_keys is not None:
        forget = OfForget(at_queries, at_keys)
    return Gradients(dq, dk, dv, jnp.sum(along, axis=(0, 2)), forget, gate)


def _launch(static: _Static, q: Array, k: Array, v: Array) -> dict[str, Any]:
    """Return the keyword arguments of the kernels."""
    size = {"length": k.shape[1], "rows": q.shape[0] * q.shape[2]}
    config = static.config or kernels.find_config(q.dtype, k.shape[3], v.shape[3], **size)
    return {**static.rule._asdict(), "config": config, "interpret": static.interpret}


def _for_kernels(extras: Extras) -> tuple[Places | None, Decay | None, Any, Any]:
    places = extras.places
    if places is not None:
        places = Places(*(a.astype(jnp.int32) for a in places))
    return places, extras.decay, extras.gate, extras.seed
