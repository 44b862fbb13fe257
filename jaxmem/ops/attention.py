"""Softmax attention with a visibility rule: causal, lagged, windowed, packed, or over a cache.

Key j is visible to query i when it is at least `lag` and fewer than `window` places behind it in
the same document. With lag 0 this is causal self-attention; with lag 1, keys as queries and
look-ahead values it is the contextual memory of Memory Mosaics. With `causal=False` every key of a
query's document is visible. A query that sees no key returns 0.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.ops import (
    attention_blocked,
    attention_cudnn,
    attention_reference,
    attention_xla,
)
from jaxmem.ops.attention_checks import check_operands, check_order, check_places
from jaxmem.ops.attention_terms import FEW, LOWEST_GATE, Dropout, gates_at, places_in_row
from jaxmem.ops.attention_xla import Read
from jaxmem.ops.checks import (
    active_dropout,
    as_arrays,
    check_clamp,
    check_precision,
    logit_scale,
)
from jaxmem.ops.dispatch import Choice, Implementation, Slower, declare, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.platforms import Kernel, run_kernel
from jaxmem.shapes import HeadScalars, Queries, SegmentIds
from pallas_kernels import attention as kernels
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels._dropout import dropout_seed
from pallas_kernels._interpret import interpreted
from pallas_kernels._tiles import LOG2_E
from pallas_kernels.attention import Operands, Rule, Saved
from pallas_kernels.pairs import FAR, Decay, PairTiles, Places

__all__ = [
    "AttentionOutput",
    "Dropout",
    "Places",
    "attention",
    "attention_with_lse",
    "places_in_row",
]

GroupKeys = Float[Array, "B S G K"]
GroupValues = Float[Array, "B S G V"]
LogForget = Float[Array, "B S H"]
ValueGate = Float[Array, "B S H"]

P = ParamSpec("P")
Result = TypeVar("Result")


class AttentionOutput(NamedTuple):
    """What `attention_with_lse` returns."""

    y: Float[Array, "B T H V"]
    lse: Float[Array, "B T H"]
    """Log-sum-exp of each query's logits, float32 or wider."""


def _attend(
    with_lse: bool,
    q: Queries,
    k: GroupKeys,
    v: GroupValues,
    *,
    scale: float | HeadScalars | None = None,
    causal: bool = True,
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
) -> AttentionOutput:
    arrays = (q, k, v, scale, segment_ids, places, log_forget, value_gate)
    q, k, v, scale, segment_ids, places, log_forget, value_gate = as_arrays(*arrays)
    check_operands(q, k, v, scale=scale, log_forget=log_forget, value_gate=value_gate)
    scale = logit_scale("attention", scale, *q.shape[2:])
    check_clamp("attention", clamp)
    check_precision(precision)
    dropout = active_dropout("attention", dropout)
    check_order(causal, lag, window, log_forget)
    check_places(q, k, causal, segment_ids, places)
    options = {"scale": scale, "causal": causal, "lag": lag, "window": window, "clamp": clamp}
    options |= {"log_forget": log_forget, "value_gate": value_gate, "dropout": dropout}
    options |= {"places or segment_ids": places or segment_ids, "log-sum-exp": with_lse or None}
    choice = resolve(
        "attention", implementation, q, k, v, interpret=interpret, config=config, **options
    )
    distances = q.shape[1] if places is None else FAR
    if log_forget is not None:
        log_forget = _gates(log_forget, segment_ids)
    rate, clamp = 0.0 if dropout is None else dropout.rate, None if clamp is None else float(clamp)
    lag, window = _distances(lag, window, distances)
    rule = Rule(lag, window, rate, precision, clamp, causal, in_order=causal and places is None)
    # Gates are summed over slots: a row's tokens stand in theirs, other queries at their places.
    slots = None if places is None else places.query
    if segment_ids is not None:
        places = places_in_row(segment_ids)
    seed = None if dropout is None else dropout_seed(dropout.key)
    operands = _operands(q, k, v, scale, _placed(places, causal), value_gate, seed)
    static = _Static(rule, config, interpreted(interpret))
    if choice.kernel == "cudnn" and not _nothing(q, k):
        read = _cudnn(rule, operands, scale, elsewhere=choice.plain is not None)
    else:
        read = _run(choice, static, operands, slots, log_forget)
    return AttentionOutput(read.y, jnp.moveaxis(read.lse, 1, 2))


def _arguments_of(
    core: Callable[Concatenate[bool, P], Any],
) -> Callable[[Callable[..., Result]], Callable[P, Result]]:
    """Let a function say that it takes what `core` takes after its first argument."""
    parameters = list(inspect.signature(core).parameters.values())[1:]

    def decorate(call: Callable[..., Result]) -> Callable[P, Result]:
        returned = inspect.signature(call).return_annotation
        signature = inspect.Signature(parameters, return_annotation=returned)
        call.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return call

    return decorate


@_arguments_of(_attend)
def attention(*arrays: Any, **options: Any) -> Float[Array, "B T H V"]:  # noqa: D417
    r"""Average values with softmax weights over the visible keys.

    y_i = Σ_j softmax_j(min(scale q_i·k_j, clamp) + Σ_{j<l≤i} log_forget_l) value_gate_j v_j over
    the j of i's document with lag <= place_i - place_j < window

    Logits and weights are float32 or wider. Cost: 2 H (K + V) FLOPs forward and 2.5 times that
    backward per visible pair. Kept for the backward pass: the operands, y and a number per query
    and head; weights that are few too (`attention_xla.fits_at_once`). Without queries or rows the
    result is empty; without keys it is 0.

    Args:
      q: queries.
      k: keys; may be wider than the values where a large scale would magnify their rounding. Query
        head h reads key/value head h // (H / G).
      v: values; their dtype is that of the result.
      scale: factor of the logits, one number or one per head; None: 1/sqrt(K). What float32 rounds
        of q·k counts `scale` times: weights and y have a relative error of about 6e-8 |scale q·k|,
        gradients of q and k that times scale. From e^16 on rounding decides between close keys; all
        stays finite.
      causal: whether places decide what is visible. Without, every key of the query's document is,
        and queries and keys may differ in number without `places`, whose numbers do not matter.
      lag: how many places a key must be behind the query; 0 includes the query's own place.
      window: how many places back keys are visible, the query's own counted, any number; None:
        all.
      segment_ids: document of each token of rows that attend to themselves; 0 is padding, which
        is not seen and counts neither in distances nor with its gates. What q, k, v and value_gate
        hold there must be finite.
      places: places and documents where queries and keys are not one row of tokens. Without them
        T = S, unless `causal` is False. From 0 to 2^30 - 1.
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
        calls in half precision. `auto` takes no kernel for 16 queries or fewer.
      precision: of float32 products; None: the fastest for values and gradients, and close to
        float32 for logits.
      config: tiles of the kernels; None: those of the table.
      interpret: run kernels interpreted; None: where there is no GPU.

    Raises:
      ShapeError: shapes do not fit, an axis but B, T and S is empty, or no distance is within `lag`
        and `window`.
      DTypeError: q, k, v, scale, log_forget or value_gate are not floating point, or documents or
        places no integers.
      ConfigError: the rate of the dropout is not in [0, 1), scale or clamp is not a finite number,
        or lag, window or log_forget come with `causal=False`.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call, or a second derivative of
        `pallas` is asked for.

    Reference: Vaswani et al. 2017, eq. 1; Memory Mosaics (arXiv 2405.06394), eq. 4 (lag 1, q = k);
      Forgetting Transformer (arXiv 2503.02130), eq. 5; FlashAttention-2 (arXiv 2307.08691); clamp
      and value_gate: `gated_softmax` of Mongaras and Larson's softmax attention as a recurrent
      network (arXiv 2507.23632), whose denominators follow from the log-sum-exp.
    """
    return _attend(False, *arrays, **options).y


@_arguments_of(_attend)
def attention_with_lse(*arrays: Any, **options: Any) -> AttentionOutput:
    """Return what `attention` returns and the log-sum-exp of each query's logits.

    lse_i = log Σ_j exp(min(scale q_i·k_j, clamp) + Σ_{j<l≤i} log_forget_l)

    The latter is float32 or wider, before dropout and value_gate, -inf where no key is visible, and
    differentiable too. Reads of two sets of keys merge with it: exp(lse - lse_both) y summed over
    both. exp(lse) y is the sum without a denominator, to be divided by any other
    (arXiv 2507.23632). Arguments and errors are those of `attention`; cuDNN does not give it.
    """
    return _attend(True, *arrays, **options)


def _pallas_unmet(
    q: Any, k: Any, v: Any, *, config: PairTiles | None = None, **_: Any
) -> str | None:
    if _nothing(q, k):
        return Slower("there is nothing to read")
    unmet = kernels.unmet(
        jnp.promote_types(q.dtype, k.dtype),
        v.dtype,
        q.shape[3],
        v.shape[3],
        length=k.shape[1],
        rows=q.shape[0] * q.shape[2],
        config=config,
    )
    if unmet is None and q.shape[1] <= FEW:
        return Slower(f"it is built for rows of queries, and {q.shape[1]} are few")
    return unmet


def _cudnn_unmet(
    q: Any, k: Any, v: Any, *, scale: Any, causal: bool, window: int | None, lag: int, **rest: Any
) -> str | None:
    present = [n for n, value in rest.items() if n != "config" and value is not None]
    present += ["lag"] if lag else []
    if present:
        return f"it has no {', '.join(present)}"
    if _nothing(q, k):
        return Slower("there is nothing to read")
    unmet = attention_cudnn.unmet(q, k, v, scale=scale, causal=causal, window=window)
    if unmet is None and q.shape[1] <= FEW:
        return Slower(f"it is built for rows of queries, and {q.shape[1]} are few")
    return unmet


declare(attention, cudnn=_cudnn_unmet, pallas=_pallas_unmet, xla=None, reference=None)


def _nothing(q: Any, k: Any) -> bool:
    return 0 in (*q.shape[:2], k.shape[1])


def _distances(lag: int, window: int | None, distances: Any) -> tuple[int, int | None]:
    """Return a rule that is the same for places fewer than `distances` apart, in small numbers."""
    if not isinstance(distances, int):  # a symbolic size
        distances = FAR
    if window is not None:
        window = None if window >= distances else int(window)
    return min(int(lag), distances), window


def _gates(log_forget: Array, segment_ids: Array | None) -> Array:
    """Return gates that a sum may hold; those of padding let all pass."""
    log_forget = jnp.maximum(log_forget, LOWEST_GATE)
    if segment_ids is None:
        return log_forget
    return jnp.where((segment_ids != 0)[..., None], log_forget, 0.0)


def _placed(places: Places | None, causal: bool) -> Places | None:
    """Return places in 32 bits, all the same where order does not count."""
    if places is None:
        return None
    places = Places(*(a.astype(jnp.int32) for a in places))
    if causal:
        return places
    query, key = (jnp.zeros_like(a) for a in (places.query, places.key))
    return places._replace(query=query, key=key)


def _operands(
    q: Array,
    k: Array,
    v: Array,
    scale: Any,
    places: Places | None,
    value_gate: Array | None,
    seed: Array | None,
) -> Operands:
    """Bring arrays into the dtypes and layouts that all implementations take."""
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k = q.astype(dtype), k.astype(dtype)
    scale = jnp.broadcast_to(jnp.asarray(scale, at_least_float32(q).dtype), q.shape[2:3])
    gate = None if value_gate is None else jnp.moveaxis(value_gate.astype(scale.dtype), 1, 2)
    return Operands(q, k, v, scale, places, None, gate, seed)


def _run(
    choice: Choice,
    static: "_Static",
    operands: Operands,
    slots: Array | None,
    log_forget: Array | None,
) -> Read:
    q, k, v = operands[:3]
    if _nothing(q, k):
        shape = (*q.shape[:3], v.shape[3])
        lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, operands.scale.dtype)
        return Read(jnp.zeros(shape, v.dtype), lse)
    if choice.implementation == "reference":
        return attention_reference.read(static.rule, operands, slots, log_forget)
    if log_forget is not None:
        decay = gates_at(log_forget.astype(operands.scale.dtype), slots)
        operands = operands._replace(decay=decay)
    if choice.kernel is None:
        return _xla(static.rule, operands)
    return run_kernel(KERNEL, static, operands, elsewhere=choice.plain is not None)


def _xla(rule: Rule, operands: Operands) -> Read:
    operands = jax.tree.map(lambda a: vary_like(a, operands), operands)
    if attention_xla.fits_at_once(operands.q, operands.k):
        return attention_xla.at_once(rule, operands)
    return attention_blocked.blocked(rule, operands)


def _cudnn(rule: Rule, operands: Operands, scale: Any, elsewhere: bool) -> Read:
    """Run cuDNN; with `elsewhere`, plain JAX where the code does not run on a GPU."""
    q, k, v = operands[:3]
    run = functools.partial(
        attention_cudnn.run, scale=scale, window=rule.window, causal=rule.causal
    )

    # cuDNN keeps y and its log-sum-exp; the residuals of both stand in one program.
    @jax.checkpoint
    def plain(q: Array, k: Array, v: Array) -> Array:
        return _xla(rule, operands._replace(q=q, k=k, v=v)).y

    y = lax.platform_dependent(q, k, v, cuda=run, default=plain) if elsewhere else run(q, k, v)
    lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), operands.scale.dtype)
    return Read(y, lse)  # a log-sum-exp that nobody asked for


class _Static(NamedTuple):
    """What a call of the kernels does not trace."""

    rule: Rule
    config: PairTiles | None
    interpret: bool

    def launch(self, operands: Operands) -> dict[str, Any]:
        """Return how the kernels are launched."""
        q, k, v = operands[:3]
        size = {"length": k.shape[1], "rows": q.shape[0] * q.shape[2]}
        config = self.config or kernels.find_config(q.dtype, k.shape[3], v.shape[3], **size)
        return {"config": config, "interpret": self.interpret}


def _kernel_forward(static: _Static, operands: tuple[Operands]) -> tuple[Read, Read]:
    """Return the read, and what the backward pass needs of it: a log-sum-exp to base 2."""
    y, lse = kernels.forward(*operands, static.rule, **static.launch(*operands))
    return Read(y, lse / LOG2_E), Read(y, lse)


def _kernel_backward(
    static: _Static, operands: tuple[Operands], read: Read, grads: Read
) -> tuple[Operands]:
    (arrays,) = operands
    wide = arrays.scale.dtype
    delta = jnp.einsum("bthv,bthv->bht", grads.y.astype(wide), read.y.astype(wide))
    delta = delta - jnp.where(read.lse == -jnp.inf, 0.0, grads.lse)
    saved = Saved(read.lse, grads.y, delta)
    launch = static.launch(arrays)
    dq, dscale, query = kernels.queries_gradient(arrays, saved, static.rule, **launch)
    dk, dv, key, dgate = kernels.keys_gradient(arrays, saved, static.rule, **launch)
    decay = None
    if query is not None and key is not None:
        decay = Decay(query, jnp.zeros_like(query), key, jnp.zeros_like(key))
    places = None if arrays.places is None else Places(None, None, None, None)
    dscale = jnp.sum(dscale, axis=(0, 2))
    return (Operands(dq, dk, dv, dscale, places, decay, dgate, None),)


def _kernel_plain(static: _Static, operands: tuple[Operands]) -> Read:
    return _xla(static.rule, *operands)


KERNEL = Kernel("attention", _kernel_forward, _kernel_backward, _kernel_plain)
