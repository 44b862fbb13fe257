"""Read of a persistent memory: softmax over stored key/value pairs, averaged over banks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.errors import ShapeError
from jaxmem.ops.attention import Dropout
from jaxmem.ops.attention_terms import softmax_weights
from jaxmem.ops.checks import (
    active_dropout,
    check_axes,
    check_floating,
    check_precision,
    logit_scale,
)
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.first_order import first_order
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import HeadScalars, Queries
from pallas_kernels import persistent_read as kernels
from pallas_kernels._compat import Precision
from pallas_kernels._dropout import dropout_seed, kept
from pallas_kernels._interpret import interpreted
from pallas_kernels.persistent_read import PersistentReadConfig

WEIGHTS_LIMIT = 8 * 2**20
"""Bytes of the weights (R, H, P, B·T) up to which the XLA form computes them all at once.

Then they are also kept for the backward pass. Beyond, it walks over blocks of queries whose weights
fit, and the backward pass computes them again: besides the memory that saves time once weights
leave the caches (on a CPU, 29 MB of weights: 104 ms for forward and backward in blocks, 128 at
once).
"""


def persistent_read(
    q: Queries,
    keys: Float[Array, "R H P K"],
    values: Float[Array, "R H P V"],
    *,
    scale: float | HeadScalars,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
    config: PersistentReadConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H V"]:
    r"""Read R banks of P stored pairs with softmax weights and average over the banks.

    y_t = (1/R) Σ_r Σ_p softmax_p(scale q_t·keys_{r,p}) values_{r,p}

    Cost: 2 B T H R P (K + V) FLOPs forward. Kept for the backward pass: the operands, the reads of
    every bank and a number per query, head and bank; small weights too (`WEIGHTS_LIMIT`).

    Args:
      q: queries; logits are computed in their dtype.
      keys: stored keys of every bank.
      values: stored values of every bank; their dtype is that of the result.
      scale: factor of the logits, one number or one per head. As in `attention`, float32 costs
        weights and y a relative error of about 6e-8 |scale q·keys|, gradients of q and keys that
        times scale.
      dropout: rate and key of the dropout of the weights; None in evaluation. Which weights are
        dropped does not depend on the implementation.
      implementation: `reference` takes one bank after another over (B, H, T, P), `xla` all at once
        or in blocks of queries, `pallas` walks over blocks of pairs and keeps weights on chip.
      precision: of float32 products; None: the fastest for values and gradients, and close to
        float32 for logits, whose scale may be as large as e^10.
      config: tiles of the kernels; None: those of the table.
      interpret: run kernels interpreted; None: where there is no GPU.

    Raises:
      ShapeError: the banks or the scale do not fit the queries or each other, or there is nothing
        to read.
      DTypeError: q, keys, values or scale are not floating point.
      ConfigError: the rate of the dropout is not in [0, 1).
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call.

    Reference: Memory Mosaics (arXiv 2405.06394), sec. 5; nanoMosaics `PersistentMem`.
    """
    check_floating("persistent_read", q=q, keys=keys, values=values, scale=scale)
    _check(q, keys, values, scale)
    check_precision(precision)
    dropout = active_dropout("persistent_read", dropout)
    form = resolve(
        "persistent_read", implementation, q, keys, values, interpret=interpret, config=config
    ).implementation
    seed, rate = None, 0.0
    if dropout is not None:
        seed, rate = dropout_seed(dropout.key), dropout.rate
    scale = jnp.broadcast_to(jnp.asarray(scale, at_least_float32(q).dtype), q.shape[2:3])
    if form == "reference":
        return _reference(q, keys, values, scale, seed, rate)
    batch, length, heads, width = q.shape
    static = _Static(form, rate, precision, config, interpreted(interpret))
    y: Array = _read(static, q.reshape(batch * length, heads, width), keys, values, scale, seed)
    return y.reshape(batch, length, heads, -1)


def _unmet(q: Any, keys: Any, values: Any, *, config: PersistentReadConfig | None) -> str | None:
    batch, length, _, width = q.shape
    banks, heads, _, value_width = values.shape
    return kernels.unmet(
        q.dtype,
        values.dtype,
        width,
        value_width,
        rows=batch * length,
        tables=banks * heads,
        config=config,
    )


declare(persistent_read, pallas=_unmet, xla=None, reference=None)


def _check(q: Array, keys: Array, values: Array, scale: float | Array) -> None:
    op = "persistent_read"
    check_axes(op, "q", q, "B T H K")
    check_axes(op, "keys", keys, "R H P K")
    check_axes(op, "values", values, "R H P V")
    if (
        keys.shape[1] != q.shape[2]
        or keys.shape[3] != q.shape[3]
        or values.shape[:3] != keys.shape[:3]
    ):
        raise ShapeError(
            f"{op}: q {q.shape}, keys {keys.shape}, values {values.shape} do not fit. "
            "Expected q [B T H K], keys [R H P K], values [R H P V]."
        )
    logit_scale(op, scale, *q.shape[2:])


class _Static(NamedTuple):
    """What a call does not trace."""

    form: str
    rate: float
    precision: Precision | None
    config: PersistentReadConfig | None
    interpret: bool


class _Residuals(NamedTuple):
    """Enough for every backward pass, whichever implementation ran forward."""

    q: Array  # [M H K], M being batch times time
    keys: Array  # [R H P K]
    values: Array  # [R H P V]
    scale: Array  # [H]
    seed: Array | None  # [2]
    reads: Array  # [R M H V], in float32: Δ comes from them
    lse: Array  # [R H M]: logarithms of the denominators, of a kernel to base 2
    weights: Array | None  # [RH P M]: what `lse` implies, where it is cheap to keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(
    static: _Static, q: Array, keys: Array, values: Array, scale: Array, seed: Array | None
) -> Any:
    """Read q [M H K] from keys [R H P K] and values [R H P V]; returns [M H V]."""
    return _read_forward(static, q, keys, values, scale, seed)[0]


def _read_forward(
    static: _Static, q: Array, keys: Array, values: Array, scale: Array, seed: Array | None
) -> tuple[Array, _Residuals]:
    weights = None
    if static.form == "pallas":
        run = functools.partial(kernels.forward, **_options(static, q, values))
        reads, lse = first_order("persistent_read", run)(
            q, keys.astype(q.dtype), values, scale, _words(seed)
        )
    else:
        reads, lse, weights = _xla_forward(static, q, keys, values, scale, seed)
    y = (jnp.mean(reads, axis=0) if len(reads) > 1 else reads[0]).astype(values.dtype)
    return y, _Residuals(q, keys, values, scale, seed, reads, lse, weights)


def _read_backward(static: _Static, residuals: _Residuals, cotangent: Array) -> tuple:
    """Apply ds = w (dw - Δ) with Δ = <dy, y>, which equals Σ_p w dw without a pass over weights."""
    q, keys, values, scale, seed, reads, lse, _ = residuals
    share = cotangent.astype(reads.dtype) / len(reads)
    if static.form == "pallas":
        grad, delta = share.astype(values.dtype), jnp.einsum("mhv,rmhv->rhm", share, reads)
        options = _options(static, q, values)
        operands = (q, keys.astype(q.dtype), values, scale, _words(seed), lse, grad, delta)
        by_query = functools.partial(kernels.queries_gradient, **options)
        by_table = functools.partial(kernels.tables_gradient, **options)
        q_grad, along = first_order("persistent_read", by_query)(*operands)
        key_grad, value_grad = first_order("persistent_read", by_table)(*operands)
        scale_grad = jnp.sum(along, axis=1)
    else:
        q_grad, key_grad, value_grad, scale_grad = _xla_backward(static, residuals, share)
    return (
        q_grad.astype(q.dtype),
        key_grad.astype(keys.dtype),
        value_grad.astype(values.dtype),
        scale_grad.astype(scale.dtype),
        None,
    )


_read.defvjp(_read_forward, _read_backward)


def _options(static: _Static, q: Array, values: Array) -> dict[str, Any]:
    config = static.config or kernels.find_config(
        q.dtype,
        q.shape[-1],
        values.shape[-1],
        rows=q.shape[0],
        tables=values.shape[0] * values.shape[1],
    )
    return {
        "rate": static.rate,
        "precision": static.precision,
        "config": config,
        "interpret": static.interpret,
    }


def _words(seed: Array | None) -> Array:
    return jnp.zeros((2,), jnp.uint32) if seed is None else seed


class _Blocks(NamedTuple):
    """How the XLA form cuts queries; one block holds all of them where weights are small."""

    number: int
    size: int


def _blocks(tables: int, pairs: int, rows: int, itemsize: int) -> _Blocks:
    fitting = WEIGHTS_LIMIT // (tables * pairs * itemsize)
    if rows <= fitting:
        return _Blocks(1, rows)
    size = max(128, fitting // 128 * 128)
    return _Blocks(-(-rows // size), size)


def _cut(x: Array, blocks: _Blocks) -> Array:
    """Cut the last axis of [... M] into blocks, [N ... m], the last one filled up with zeros."""
    fill = blocks.number * blocks.size - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks.number, blocks.size), -2, 0)


def _joined(x: Array, rows: int) -> Array:
    """Undo `_cut`."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :rows]


def _merge_banks(table: Array) -> Array:
    """Treat banks as further heads, [R H ...] to [RH ...].

    A product that contracts over banks and pairs at once is rewritten by XLA with copies of the
    weights, so banks are a batch axis throughout.
    """
    return table.reshape(-1, *table.shape[2:])


def _by_table(x: Array, banks: int) -> Array:
    """Lay rows out last, [M H K] to [RH K M], with a copy for every bank."""
    return jnp.tile(jnp.moveaxis(x, 0, 2), (banks, 1, 1))


def _xla_forward(
    static: _Static, q: Array, keys: Array, values: Array, scale: Array, seed: Array | None
) -> tuple[Array, Array, Array | None]:
    """Keep the weights pair-major, [RH P M].

    Then all six products of a training step contract an axis that is contiguous or leading. With
    time-major weights the two products that give the gradients of the tables are transposed, and
    XLA's CPU backend takes four times as long for them (measured: 2.5 against 0.64 ms each at
    H 4, M 768, P 448, K 32).
    """
    rows, (banks, heads, pairs, value_width) = q.shape[0], values.shape
    blocks = _blocks(banks * heads, pairs, rows, scale.dtype.itemsize)
    stored, read = _merge_banks(keys).astype(q.dtype), _merge_banks(values)
    scales = jnp.tile(scale, banks)

    def block(q: Array, start: Array | int) -> tuple[Array, Array, Array]:
        logits = _logits(static, stored, q, scales)
        top = jnp.max(logits, axis=1, keepdims=True)
        weights = softmax_weights(logits, top)
        total = jnp.sum(weights, axis=1, keepdims=True)
        total = jnp.where(total < 0.5, 1.0, total)
        weights = weights / total
        factors = _kept(static, seed, weights.shape, start, rows)
        y = _product(static, "hpv,hpm->hvm", read, _dropped(weights, factors, read.dtype), scale)
        return y, (top + jnp.log(total))[:, 0], weights

    flat = _by_table(q, banks)
    if blocks.number == 1:
        y, lse, weights = block(flat, 0)
    else:

        def walk(start: Array, q: Array) -> tuple[Array, tuple[Array, Array]]:
            return start + blocks.size, block(q, start)[:2]

        _, (y, lse) = lax.scan(walk, jnp.int32(0), _cut(flat, blocks))
        y, lse, weights = _joined(y, rows), _joined(lse, rows), None
    reads = jnp.moveaxis(y.reshape(banks, heads, value_width, rows), 3, 1)
    return reads, lse.reshape(banks, heads, rows), weights


def _xla_backward(static: _Static, residuals: _Residuals, share: Array) -> tuple[Array, ...]:
    """Return the gradients of q, keys, values and scale; `share` is that of each bank's read.

    The gradient of the scale is Σ <q, dq> before scaling, which needs no pass over the weights.
    """
    q, keys, values, scale, seed, reads, lse, weights = residuals
    rows, (banks, heads, pairs, _) = q.shape[0], values.shape
    blocks = _blocks(banks * heads, pairs, rows, scale.dtype.itemsize)
    stored, read = _merge_banks(keys).astype(q.dtype), _merge_banks(values)
    scales = jnp.tile(scale, banks)

    def block(inputs: tuple[Array, ...], weights: Array | None, start: Array | int) -> tuple:
        q, grad, delta, lse = inputs
        if weights is None:
            weights = softmax_weights(_logits(static, stored, q, scales), lse[:, None])
        factors = _kept(static, seed, weights.shape, start, rows)
        weight_grad = _product(static, "hpv,hvm->hpm", read, grad, scale)
        if factors is not None:
            weight_grad = weight_grad * factors
        logit_grad = (weights * (weight_grad - delta[:, None])).astype(q.dtype)
        dropped = _dropped(weights, factors, read.dtype)
        return (
            # XLA would fold the transposition of this gradient into the product, which is slower.
            lax.optimization_barrier(_product(static, "hpk,hpm->hkm", stored, logit_grad, scale)),
            _product(static, "hpm,hkm->hpk", logit_grad, q, scale),
            _product(static, "hpm,hvm->hpv", dropped, grad, scale),
        )

    grad = _by_table(share, banks)
    # In this layout, which undoes that of the forward pass, XLA fuses Δ into the product after it.
    delta = jnp.sum(grad * _merge_banks(jnp.moveaxis(reads, 1, 3)), axis=1)
    inputs = (_by_table(q, banks), grad.astype(values.dtype), delta, _merge_banks(lse))
    if blocks.number == 1:
        q_grad, key_grad, value_grad = block(inputs, weights, 0)
    else:

        def walk(carry: tuple, inputs: tuple[Array, ...]) -> tuple[tuple, Array]:
            start, key_grad, value_grad = carry
            q_grad, by_key, by_value = block(inputs, None, start)
            return (start + blocks.size, key_grad + by_key, value_grad + by_value), q_grad

        zeros = (jnp.zeros(table.shape, scale.dtype) for table in (stored, read))
        cut = tuple(_cut(x, blocks) for x in inputs)
        (_, key_grad, value_grad), q_grad = lax.scan(walk, (jnp.int32(0), *zeros), cut)
        q_grad = _joined(q_grad, rows)
    by_bank = q_grad.reshape(banks, heads, -1, rows)
    scale_grad = jnp.einsum("mhk,rhkm->h", q.astype(scale.dtype), by_bank)
    q_grad = jnp.moveaxis(jnp.sum(by_bank, axis=0) * scale[:, None, None], 2, 0)
    key_grad = (key_grad * scales[:, None, None]).reshape(keys.shape)
    return q_grad, key_grad, value_grad.reshape(values.shape), scale_grad


def _logits(static: _Static, keys: Array, q: Array, scale: Array) -> Array:
    dots = jnp.einsum(
        "hpk,hkm->hpm",
        keys,
        q,
        precision=static.precision or "high",
        preferred_element_type=scale.dtype,
    )
    return dots * scale[:, None, None]


def _product(static: _Static, formula: str, a: Array, b: Array, like: Array) -> Array:
    return jnp.einsum(formula, a, b, precision=static.precision, preferred_element_type=like.dtype)


def _kept(
    static: _Static, seed: Array | None, shape: tuple[int, ...], start: Array | int, rows: int
) -> Array | None:
    """Return the dropout factors of a block [RH P m] whose first row is `start`."""
    if seed is None:
        return None
    tables, pairs, size = shape
    place = jnp.arange(tables)[:, None, None] * rows + start + jnp.arange(size)[None, None, :]
    return kept(seed[0], seed[1], place, jnp.arange(pairs)[None, :, None], static.rate)


def _dropped(weights: Array, factors: Array | None, dtype: Any) -> Array:
    return (weights if factors is None else weights * factors).astype(dtype)


def _reference(
    q: Array, keys: Array, values: Array, scale: Array, seed: Array | None, rate: float
) -> Float[Array, "B T H V"]:
    batch, length, heads, _ = q.shape
    wide = at_least_float32(q)
    pairs = jnp.arange(keys.shape[2])
    reads = []
    for bank in range(keys.shape[0]):
        logits = jnp.einsum("bthk,hpk->bhtp", wide, keys[bank].astype(wide.dtype))
        logits = logits * scale[:, None, None]
        top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = softmax_weights(logits, top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total < 0.5, 1.0, total)
        if seed is not None:
            first = jnp.arange(batch)[:, None, None] * length + jnp.arange(length)
            table = bank * heads + jnp.arange(heads)[:, None]
            places = (table * (batch * length) + first)[..., None]
            weights = weights * kept(seed[0], seed[1], places, pairs, rate)
        reads.append(jnp.einsum("bhtp,hpv->bthv", weights, values[bank].astype(wide.dtype)))
    return (sum(reads[1:], reads[0]) / len(reads)).astype(values.dtype)
