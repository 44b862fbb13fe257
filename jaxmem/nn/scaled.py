"""Vectors with a factor that is kept as a logarithm, and norms that take it.

The numerator of softmax attention without its denominator is e^lse times a weighted mean. The mean
is harmless and e^lse is not: at logits of 1000 no float holds it. Norms that do not see a positive
factor, but for their epsilon, never need it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.ops.norms import at_least_float32

L2_FLOOR = 1e-12
"""Least length that an l2 norm divides by."""


class Scaled(NamedTuple):
    """Vectors e^exponent x, in float32 or wider; the exponent is >= 0 and has no gradient."""

    x: Float[Array, "B T H V"]
    exponent: Float[Array, "#B #T #H"]


def scaled(x: Float[Array, "B T H V"], log_factor: Float[Array, "B T H"] | None = None) -> Scaled:
    """Return e^log_factor x, whose factor is applied as far as it is less than 1.

    A factor of -inf gives 0, with gradient 0.
    """
    x = at_least_float32(x)
    if log_factor is None:
        return Scaled(x, jnp.zeros((1, 1, 1), x.dtype))
    some = log_factor > -jnp.inf
    log_factor = jnp.where(some, log_factor, 0.0)
    exponent = lax.stop_gradient(jnp.maximum(log_factor, 0.0))
    small = jnp.exp(log_factor - exponent)
    return Scaled(jnp.where(some, small, 0.0)[..., None] * x, exponent)


def value(of: Scaled) -> Array:
    """Return the vectors themselves."""
    return of.x * jnp.exp(of.exponent)[..., None]


def layer_normed(of: Scaled, weight: Array, bias: Array, eps: float) -> Array:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis."""
    centred = of.x - jnp.mean(of.x, axis=-1, keepdims=True)
    return _over_root(centred, of.exponent, eps) * weight + bias


def rms_normed(of: Scaled, weight: Array, eps: float) -> Array:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis."""
    return _over_root(of.x, of.exponent, eps) * weight


def l2_normed(of: Scaled) -> Array:
    """Return x / max(|x|, 1e-12) over the last axis."""
    square = jnp.sum(of.x * of.x, axis=-1, keepdims=True)
    return of.x * lax.rsqrt(jnp.maximum(square, _shrunk(L2_FLOOR**2, of.exponent, of.x.dtype)))


def _over_root(x: Array, exponent: Array, eps: float) -> Array:
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(square + _shrunk(eps, exponent, x.dtype))


def _shrunk(eps: float, exponent: Array, dtype: jnp.dtype) -> Array:
    """Return eps e^{-2 exponent}, what eps is to x without its factor, but never 0."""
    tiny = jnp.finfo(dtype).tiny
    return jnp.maximum(eps * jnp.exp(-2.0 * exponent), tiny)[..., None]
