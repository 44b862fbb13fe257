"""Read of a persistent memory: softmax over stored key/value pairs, averaged over banks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.errors import ShapeError
from jaxmem.ops.attention import Dropout
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import HeadScalars, Queries

declare("persistent_read", "xla", "reference")


def persistent_read(
    q: Queries,
    keys: Float[Array, "R H P K"],
    values: Float[Array, "R H P V"],
    *,
    scale: HeadScalars,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H V"]:
    r"""Read R banks of P stored pairs with softmax weights and average over the banks.

    y_t = (1/R) Σ_r Σ_p softmax_p(scale q_t·keys_{r,p}) values_{r,p}

    Cost: 2 B T H R P (K + V) FLOPs forward; the weights (R, H, P, B·T) are kept for the backward
    pass.

    Args:
      q: queries; logits are computed in their dtype.
      keys: stored keys of every bank.
      values: stored values of every bank; their dtype is that of the result.
      scale: factor of the logits, one per head.
      dropout: rate and key of the dropout of the weights; None in evaluation.
      implementation: `reference` takes one bank after another over (B, H, T, P), `xla` takes
        all at once with a layout and a backward pass of its own.

    Raises:
      ShapeError: the banks do not fit the queries or each other.

    Reference: Memory Mosaics (arXiv 2405.06394), sec. 5; nanoMosaics `PersistentMem`.
    """
    if (
        keys.shape[1] != q.shape[2]
        or keys.shape[3] != q.shape[3]
        or values.shape[:3] != keys.shape[:3]
    ):
        raise ShapeError(
            f"persistent_read: q {q.shape}, keys {keys.shape}, values {values.shape} do not fit. "
            "Expected q [B T H K], keys [R H P K], values [R H P V]."
        )
    form = resolve("persistent_read", implementation)
    batch, length, heads, _ = q.shape
    banks = keys.shape[0]
    kept = None
    if dropout is not None and dropout.rate > 0.0:
        shape = (*keys.shape[:3], batch * length)
        keep = 1.0 - dropout.rate
        kept = jax.random.bernoulli(dropout.key, keep, shape) / keep
    scale = scale.astype(at_least_float32(q).dtype)
    if form == "reference":
        return _reference(q, keys, values, scale, kept)
    flat = jnp.transpose(q, (2, 3, 0, 1)).reshape(heads, -1, batch * length)
    y = _read(
        jnp.tile(flat, (banks, 1, 1)),
        _merge_banks(keys).astype(q.dtype),
        _merge_banks(values),
        jnp.tile(scale, banks),
        None if kept is None else _merge_banks(kept),
    )
    y = jnp.mean(y.reshape(banks, heads, -1, batch, length), axis=0)
    return jnp.moveaxis(y, (2, 3), (0, 1)).astype(values.dtype)


def _merge_banks(table: Array) -> Array:
    """Treat banks as further heads, [R H ...] to [R·H ...].

    A product that contracts over banks and pairs at once is rewritten by XLA with copies of the
    weights, so banks are a batch axis throughout.
    """
    return table.reshape(-1, *table.shape[2:])


@jax.custom_vjp
def _read(q: Array, keys: Array, values: Array, scale: Array, kept: Array | None) -> Array:
    """Read one table per head: q [H K M] gives [H V M], M being batch times time."""
    return _read_forward(q, keys, values, scale, kept)[0]


class _Residuals(NamedTuple):
    q: Array  # [H K M]
    keys: Array  # [H P K]
    values: Array  # [H P V]
    scale: Array  # [H]
    kept: Array | None  # [H P M]
    weights: Array  # [H P M]
    y: Array  # [H V M]


def _read_forward(
    q: Array, keys: Array, values: Array, scale: Array, kept: Array | None
) -> tuple[Array, _Residuals]:
    """Keep the weights pair-major, [H P M].

    Then all six products of a training step contract an axis that is contiguous or leading. With
    time-major weights the two products that give the gradients of the tables are transposed, and
    XLA's CPU backend takes four times as long for them (measured: 2.5 against 0.64 ms each at
    H 4, M 768, P 448, K 32).
    """
    logits = jnp.einsum("hpk,hkm->hpm", keys, q, preferred_element_type=scale.dtype)
    logits = logits * scale[:, None, None]
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    read = (weights if kept is None else weights * kept.astype(weights.dtype)).astype(values.dtype)
    y = jnp.einsum("hpv,hpm->hvm", values, read, preferred_element_type=scale.dtype)
    return y, _Residuals(q, keys, values, scale, kept, weights, y)


def _read_backward(residuals: _Residuals, cotangent: Array) -> tuple[Array | None, ...]:
    """Apply ds = w (dw - <dy, y>), where <dy, y> = Σ_p w dw needs no pass over the weights.

    The gradient of the scale is Σ <q, dq> before scaling, which needs no pass either.
    """
    q, keys, values, scale, kept, weights, y = residuals
    wide = weights.dtype
    grad = cotangent.astype(values.dtype)
    inner = jnp.sum(cotangent * y, axis=1)[:, None]
    weight_grad = jnp.einsum("hpv,hvm->hpm", values, grad, preferred_element_type=wide)
    read = weights
    if kept is not None:
        weight_grad = weight_grad * kept.astype(wide)
        read = weights * kept.astype(wide)
    logit_grad = (weights * (weight_grad - inner)).astype(q.dtype)
    q_grad = jnp.einsum("hpk,hpm->hkm", keys, logit_grad, preferred_element_type=wide)
    # XLA would fold the transposition of this gradient into the product, which is slower.
    q_grad = lax.optimization_barrier(q_grad)
    key_grad = jnp.einsum("hpm,hkm->hpk", logit_grad, q, preferred_element_type=wide)
    read = read.astype(values.dtype)
    value_grad = jnp.einsum("hpm,hvm->hpv", read, grad, preferred_element_type=wide)
    by_head = scale[:, None, None]
    return (
        (q_grad * by_head).astype(q.dtype),
        (key_grad * by_head).astype(keys.dtype),
        value_grad.astype(values.dtype),
        jnp.sum(q_grad * q.astype(wide), axis=(1, 2)),
        None,
    )


_read.defvjp(_read_forward, _read_backward)


def _reference(
    q: Array, keys: Array, values: Array, scale: Array, kept: Array | None
) -> Float[Array, "B T H V"]:
    batch, length = q.shape[:2]
    wide = at_least_float32(q)
    reads = []
    for bank in range(keys.shape[0]):
        logits = jnp.einsum("bthk,hpk->bhtp", wide, keys[bank].astype(wide.dtype))
        weights = jax.nn.softmax(logits * scale[:, None, None], axis=-1)
        if kept is not None:
            by_row = kept[bank].reshape(*kept.shape[1:3], batch, length)
            weights = weights * jnp.transpose(by_row, (2, 0, 3, 1)).astype(weights.dtype)
        reads.append(jnp.einsum("bhtp,hpv->bthv", weights, values[bank].astype(wide.dtype)))
    return (sum(reads[1:], reads[0]) / len(reads)).astype(values.dtype)
