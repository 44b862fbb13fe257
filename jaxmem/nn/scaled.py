"""Vectors with a factor that is kept as a logarithm, and norms that take it.

The numerator of softmax attention without its denominator is e^lse times a weighted mean. The mean
is harmless and e^lse is not: at logits of 1000 no float holds it. Norms that do not see a positive
factor, but for their epsilon, never need it.
"""

import math
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


def divided(y: Float[Array, "B T H V"], total: Float[Array, "#B T #H"]) -> Float[Array, "B T H V"]:
    """Return y / total, in float32 or wider; 0 with gradient 0 where the total is 0 or subnormal.

    The gradient of a plain quotient has total**-2 in it, which no float32 holds for totals below
    1e-19. So both sides are first brought to the size of 1 by a factor that has no gradient.
    """
    y = at_least_float32(y)
    some = jnp.abs(total) >= jnp.finfo(y.dtype).tiny
    total = jnp.where(some, total, 1.0)
    inverse = lax.stop_gradient(1.0 / total)
    quotient = y * inverse[..., None] / (total * inverse)[..., None]
    return jnp.where(some[..., None], quotient, 0.0)


def changed_sum(
    log_sum: Float[Array, "B T H"], *, floor: float, eps: float, detach: bool
) -> Float[Array, "B T H"]:
    """Return log(max(sum, floor) + eps); `detach` stops the gradient of the sum."""
    log = jnp.maximum(log_sum, math.log(floor)) if floor else log_sum
    log = lax.stop_gradient(log) if detach else log
    return jnp.logaddexp(log, math.log(eps)) if eps else log


def times_exp(of: Scaled, log_factor: Float[Array, "B T H"]) -> Scaled:
    """Return e^log_factor times the vectors."""
    more = lax.stop_gradient(jnp.maximum(log_factor, 0.0))
    return Scaled(of.x * jnp.exp(log_factor - more)[..., None], of.exponent + more)


def value(of: Scaled) -> Array:
    """Return the vectors themselves."""
    return of.x * jnp.exp(of.exponent)[..., None]


def layer_normed(of: Scaled, weight: Array, bias: Array | None, eps: float) -> Array:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis."""
    centred = of.x - jnp.mean(of.x, axis=-1, keepdims=True)
    y = _over_root(centred, of.exponent, eps) * weight
    return y if bias is None else y + bias


def rms_normed(of: Scaled, weight: Array, eps: float) -> Array:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis."""
    return _over_root(of.x, of.exponent, eps) * weight


def l2_normed(of: Scaled) -> Array:
    """Return x / max(|x|, 1e-12) over the last axis."""
    x, floor = _sized(of.x, of.exponent, L2_FLOOR)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(square, floor * floor))


def _over_root(x: Array, exponent: Array, eps: float) -> Array:
    x, root = _sized(x, exponent, math.sqrt(eps))
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + root * root)


def _sized(x: Array, exponent: Array, floor: float) -> tuple[Array, Array]:
    """Return x and the floor of its length, without x's own factor, brought to the size of 1.

    Norms do not see the factor, which has no gradient; but squares of large x would leave the range
    of floats, and so would gradients at small x and floors, which have their third powers.
    """
    # Not smaller than what has a square.
    floors = floor * jnp.exp(-exponent)[..., None]
    floors = jnp.maximum(floors, math.sqrt(float(jnp.finfo(x.dtype).tiny)))
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    inverse = lax.stop_gradient(1.0 / jnp.maximum(largest, floors))
    return x * inverse, floors * inverse
