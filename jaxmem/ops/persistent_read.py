"""Read of a persistent memory: softmax over stored key/value pairs, averaged over banks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmem.errors import ShapeError
from jaxmem.ops import persistent_read_xla
from jaxmem.ops.attention_terms import FEW, Dropout, softmax_weights
from jaxmem.ops.checks import (
    active_dropout,
    as_arrays,
    check_axes,
    check_floating,
    check_precision,
    logit_scale,
)
from jaxmem.ops.dispatch import Implementation, Slower, declare, resolve
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.platforms import Kernel, run_kernel
from jaxmem.shapes import HeadScalars, Queries
from pallas_kernels import persistent_read as kernels
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels._dropout import dropout_seed, kept
from pallas_kernels._interpret import interpreted
from pallas_kernels.persistent_read import Operands, PersistentReadConfig, Saved


def persistent_read(
    q: Queries,
    keys: Float[Array, "R H P K"],
    values: Float[Array, "R H P V"],
    *,
    scale: float | HeadScalars | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
    config: PersistentReadConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T H V"]:
    r"""Read R banks of P stored pairs with softmax weights and average over the banks.

    y_t = (1/R) Σ_r Σ_p softmax_p(scale q_t·keys_{r,p}) values_{r,p}

    Cost: 2 B T H R P (K + V) FLOPs forward. Kept for the backward pass: the operands, the reads of
    every bank and a number per query, head and bank; small weights too
    (`persistent_read_xla.WEIGHTS_LIMIT`).

    Args:
      q: queries; logits are computed in their dtype.
      keys: stored keys of every bank.
      values: stored values of every bank; their dtype is that of the result.
      scale: factor of the logits, one number or one per head; None: 1/sqrt(K). As in `attention`,
        float32 costs weights and y a relative error of about 6e-8 |scale q·keys|, gradients of q
        and keys that times scale.
      dropout: rate and key of the dropout of the weights; None in evaluation. Which weights are
        dropped does not depend on the implementation.
      implementation: `reference` takes one bank after another over (B, H, T, P), `xla` all at once
        or in blocks of queries, `pallas` walks over blocks of pairs and keeps weights on chip.
        `auto` takes no kernel for 16 queries or fewer.
      precision: of float32 products; None: the fastest for values and gradients, and close to
        float32 for logits, whose scale may be as large as e^22.
      config: tiles of the kernels; None: those of the table.
      interpret: run kernels interpreted; None: where there is no GPU.

    Raises:
      ShapeError: banks or scale do not fit the queries or each other, or there are no pairs.
      DTypeError: q, keys, values or scale are not floating point.
      ConfigError: the rate of the dropout is not in [0, 1), or scale is not a finite number.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation cannot run this call, or a second derivative of
        `pallas` is asked for.

    Reference: Memory Mosaics (arXiv 2405.06394), sec. 5; nanoMosaics `PersistentMem`.
    """
    q, keys, values, scale = as_arrays(q, keys, values, scale)
    check_floating("persistent_read", q=q, keys=keys, values=values, scale=scale)
    _check(q, keys, values)
    scale = logit_scale("persistent_read", scale, *q.shape[2:])
    check_precision(precision)
    dropout = active_dropout("persistent_read", dropout)
    choice = resolve(
        "persistent_read", implementation, q, keys, values, interpret=interpret, config=config
    )
    batch, length, heads, width = q.shape
    if 0 in (batch, length):
        return jnp.zeros((batch, length, heads, values.shape[3]), values.dtype)
    rate, seed = 0.0, None
    if dropout is not None:
        rate, seed = dropout.rate, dropout_seed(dropout.key)
    scale = jnp.broadcast_to(jnp.asarray(scale, at_least_float32(q).dtype), (heads,))
    operands = Operands(q, keys, values, scale, seed)
    if choice.implementation == "reference":
        return _reference(operands, rate)
    flat = q.reshape(batch * length, heads, width)
    operands = operands._replace(q=flat)
    static = _Static(rate, precision, config, interpreted(interpret))
    if choice.kernel is None:
        y = _plain(static, (operands,))
    else:
        y = run_kernel(KERNEL, static, operands, elsewhere=choice.plain is not None)
    return y.reshape(batch, length, heads, values.shape[3])


def _unmet(q: Any, keys: Any, values: Any, *, config: PersistentReadConfig | None) -> str | None:
    batch, length, _, width = q.shape
    banks, heads, _, value_width = values.shape
    if 0 in (batch, length):
        return Slower("there is nothing to read")
    unmet = kernels.unmet(
        q.dtype,
        values.dtype,
        width,
        value_width,
        rows=batch * length,
        tables=banks * heads,
        config=config,
    )
    if unmet is None and length <= FEW:
        return Slower(f"it is built for many queries, and {length} per row are few")
    return unmet


declare(persistent_read, pallas=_unmet, xla=None, reference=None)


def _check(q: Array, keys: Array, values: Array) -> None:
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


class _Static(NamedTuple):
    """What a call does not trace."""

    rate: float
    precision: Precision | None
    config: PersistentReadConfig | None
    interpret: bool

    def launch(self, operands: Operands) -> dict[str, Any]:
        """Return the keyword arguments of the kernels."""
        q, _, values = operands[:3]
        size = {"rows": q.shape[0], "tables": values.shape[0] * values.shape[1]}
        config = self.config or kernels.find_config(q.dtype, q.shape[2], values.shape[3], **size)
        options = {"rate": self.rate, "precision": self.precision}
        return {**options, "config": config, "interpret": self.interpret}


def _plain(static: _Static, operands: tuple[Operands]) -> Array:
    rule = persistent_read_xla.Rule(static.rate, static.precision)
    (varying,) = jax.tree.map(lambda a: vary_like(a, operands), operands)
    return persistent_read_xla.read(rule, varying)


def _for_kernels(operands: Operands) -> Operands:
    return operands._replace(keys=operands.keys.astype(operands.q.dtype))


class _Reads(NamedTuple):
    """What a backward pass of the kernels needs."""

    y: Array
    """The read of every bank [R M H V], float32."""
    lse: Array
    """Logarithms to base 2 of the denominators [R H M]."""


def _kernel_forward(static: _Static, operands: tuple[Operands]) -> tuple[Array, _Reads]:
    arrays = _for_kernels(*operands)
    reads = _Reads(*kernels.forward(arrays, **static.launch(arrays)))
    return jnp.mean(reads.y, axis=0).astype(arrays.values.dtype), reads


def _kernel_backward(
    static: _Static, operands: tuple[Operands], reads: _Reads, grad: Array
) -> tuple[Operands]:
    """Apply ds = w (dw - Δ) with Δ = <dy, y>, which equals Σ_p w dw without a pass over weights."""
    arrays = _for_kernels(*operands)
    share = grad.astype(reads.y.dtype) / len(reads.y)
    delta = jnp.einsum("mhv,rmhv->rhm", share, reads.y)
    saved = Saved(reads.lse, share.astype(arrays.values.dtype), delta)
    launch = static.launch(arrays)
    dq, dscale = kernels.queries_gradient(arrays, saved, **launch)
    dkeys, dvalues = kernels.tables_gradient(arrays, saved, **launch)
    dkeys, dvalues = dkeys.astype(operands[0].keys.dtype), dvalues.astype(arrays.values.dtype)
    return (Operands(dq, dkeys, dvalues, jnp.sum(dscale, axis=1), None),)


KERNEL = Kernel("persistent_read", _kernel_forward, _kernel_backward, _plain)


def _reference(operands: Operands, rate: float) -> Float[Array, "B T H V"]:
    q, keys, values, scale, seed = operands
    batch, length, heads, _ = q.shape
    wide = at_least_float32(q)
    pairs = jnp.arange(keys.shape[2])
    reads = []
    for bank in range(keys.shape[0]):
        logits = jnp.einsum("bthk,hpk->bhtp", wide, keys[bank].astype(wide.dtype))
        logits = logits * scale[:, None, None]
        row_max = jnp.max(logits, axis=-1, keepdims=True)
        weights = softmax_weights(logits, row_max)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total < 0.5, 1.0, total)
        if seed is not None:
            first = jnp.arange(batch)[:, None, None] * length + jnp.arange(length)
            table = bank * heads + jnp.arange(heads)[:, None]
            places = (table * (batch * length) + first)[..., None]
            weights = weights * kept(seed[0], seed[1], places, pairs, rate)
        reads.append(jnp.einsum("bhtp,hpv->bthv", weights, values[bank].astype(wide.dtype)))
    return (sum(reads[1:], reads[0]) / len(reads)).astype(values.dtype)
