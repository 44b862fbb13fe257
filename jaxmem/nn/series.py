"""Coefficients of polynomials that stand for exp in attention: powers, Taylor's, learnt ones."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmem.ops.polynomial_attention import Coefficients

Polynomial = Literal["pow1", "pow2", "taylor", "series", "head_series"]


def first_coefficients(kind: str, terms: int, heads: int) -> Array | None:
    """Return what learnt coefficients start from, those of Taylor's sum; None if none are."""
    if kind == "series":
        return jnp.ones((terms,))
    return jnp.zeros((terms, heads)) if kind == "head_series" else None


def coefficients(kind: str, terms: int, learnt: Array | None) -> int | Coefficients:
    """Return κ's coefficients, or the number of terms of Taylor's sum.

    series: θ_n / n!; head_series: 2 σ(c_n) / n! per head
    """
    if kind in ("pow1", "pow2"):
        return jnp.asarray([0.0, 1.0] if kind == "pow1" else [0.0, 0.0, 1.0])
    if learnt is None:
        return terms
    factorials = jnp.exp(-jax.lax.lgamma(jnp.arange(1.0, terms + 1.0, dtype=learnt.dtype)))
    if kind == "series":
        return learnt * factorials
    return 2.0 * jax.nn.sigmoid(learnt) * factorials[:, None]
