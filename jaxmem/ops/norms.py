"""Normalisations, computed in float32 or better whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

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
    wide = at_least_float32(x)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(wide.dtype)
    return y.astype(x.dtype)


def _standardise_value(x: Array, eps: float) -> Array:
    return _standardise_forward(x, eps)[0]


def _standardise_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = centred * inverse
    return y, (y, inverse)


def _standardise_backward(
    eps: float, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array]:
    """Return (g - mean(g) - y mean(g y)) / std in one pass.

    Autodiff would leave the two means apart, and XLA then adds those of all layers in one late
    fusion over the residual stream.
    """
    del eps
    y, inverse = residuals
    mean = jnp.mean(cotangent, axis=-1, keepdims=True)
    along = jnp.mean(cotangent * y, axis=-1, keepdims=True)
    return (inverse * (cotangent - mean - y * along),)


_standardise = jax.custom_vjp(_standardise_value, nondiff_argnums=(1,))
_standardise.defvjp(_standardise_forward, _standardise_backward)


def clamped_exp(log_scale: HeadScalars, power: int, limit: float) -> HeadScalars:
    """Return exp(min(power * 10 * log_scale, limit)), the learnt scale of Memory Mosaics.

    The raw parameter is a tenth of the exponent, so one AdamW step moves the exponent ten times
    as far. The gradient is 0 beyond the limit.
    """
    return jnp.exp(jnp.minimum(power * 10.0 * log_scale, limit))
