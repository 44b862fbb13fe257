"""Normalisations, computed in float32 or better whatever the dtype of the input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.ops.checks import as_arrays
from jaxmem.shapes import HeadScalars

_TINY = 1e-20
EPS_FLOAT32 = float(jnp.finfo(jnp.float32).eps)
"""The epsilon of PyTorch's root-mean-square norms where none is set."""


def at_least_float32(x: Array) -> Array:
    """Promote half precision to float32 and leave wider types alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalise(x: Float[Array, "..."], *, axis: int = -1) -> Float[Array, "..."]:
    r"""Scale to unit Euclidean length, y = x / |x|, on one axis.

    Differs: the authors divide by |x| or |x| + 1e-10, which gives NaN or a gradient of 1e10 at 0.
    Here a vector shorter than 1e-10 becomes 0 with gradient 0; elsewhere the difference is below
    float32 resolution.

    Reference: Memory Mosaics (arXiv 2405.06394), sec. 4; nanoMosaics `KeyFeatureExtractor`.
    """
    (x,) = as_arrays(x)
    wide = at_least_float32(x)
    square = jnp.sum(wide * wide, axis=axis, keepdims=True)
    longer = square > _TINY
    unit = wide * lax.rsqrt(jnp.where(longer, square, 1.0))
    return jnp.where(longer, unit, 0.0).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "... D"]:
    """Normalise to mean 0 and variance 1 on the last axis, then scale and shift.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    """
    x, weight, bias = as_arrays(x, weight, bias)
    wide = at_least_float32(x)
    y = _standardise(wide, eps) * weight.astype(wide.dtype)
    if bias is not None:
        y = y + bias.astype(wide.dtype)
    return y.astype(x.dtype)


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"] | None, *, eps: float = 1e-5
) -> Float[Array, "... D"]:
    """Divide by the root mean square of the last axis, then scale.

    y = x / sqrt(mean(x²) + eps) * weight

    Args:
      x: rows of numbers of any size; a row of zeros stays zero, with gradient weight / sqrt(eps).
      weight: None: no scale.
      eps: added to the mean square, >= 0; 0 makes rows of zeros NaN.

    Reference: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4. Differs: Llama rounds to the dtype
      of x before it scales; here the result is rounded once.
    """
    x, weight = as_arrays(x, weight)
    wide = at_least_float32(x)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(wide.dtype)
    return y.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardise(x: Array, eps: float) -> Array:
    return _standardise_with_inverse(x, eps)[0]


def _standardise_with_inverse(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * inverse, inverse


@_standardise.defjvp
def _differentiate(eps: float, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    y, inverse = _standardise_with_inverse(*primals, eps)
    return y, _project(y, inverse, *tangents)


@jax.jit
def _project(y: Array, inverse: Array, dx: Array) -> Array:
    """Return (dx - mean(dx) - y mean(y dx)) / std, a map that is its own transpose.

    It is a function of its own so that its transpose comes in one pass: of separate operations
    JAX would add one term after the other to the gradient of x, and XLA then fuse the two means of
    all layers late, over the residual stream.
    """
    mean = jnp.mean(dx, axis=-1, keepdims=True)
    along = jnp.mean(dx * y, axis=-1, keepdims=True)
    return inverse * (dx - mean - y * along)


def clamped_exp(log_scale: HeadScalars, power: int, limit: float) -> HeadScalars:
    """Return exp(min(power * 10 * log_scale, limit)), the learnt scale of Memory Mosaics.

    The raw parameter is a tenth of the exponent, so one AdamW step moves the exponent ten times
    as far. The gradient is 0 beyond the limit.
    """
    return jnp.exp(jnp.minimum(power * 10.0 * log_scale, limit))
