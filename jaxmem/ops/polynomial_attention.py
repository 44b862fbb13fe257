r"""Attention whose weights are a polynomial of the scaled products: Taylor sums of exp, or learnt.

y_i = Σ_j κ(min(scale q_i·k_j, clamp)) e^{F_i - F_j} v_j,  κ(s) = Σ_n c_n s^n

Order by order each term of Taylor's sum is a linear recurrence, and all of them together are
softmax attention's numerator; this op takes all pairs of tokens at once and has no such state.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.attention_terms import Places, gates_at, visible
from jaxmem.ops.checks import (
    as_arrays,
    check_axes,
    check_clamp,
    check_documents,
    check_floating,
    check_precision,
    check_shape,
    number_scale,
)
from jaxmem.ops.dispatch import Implementation, declare, resolve
from jaxmem.ops.linear_terms import finite_gates
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.similarity import CAUSAL, Pairs, Similarity, similarity_sums
from jaxmem.shapes import Keys, Queries, Values
from pallas_kernels._compat import Precision, vary_like

Coefficients = Float[Array, "N"] | Float[Array, "N H"]


class PolynomialOutput(NamedTuple):
    """What `polynomial_attention` returns."""

    y: Float[Array, "B T H V"]
    """Weighted sums of values, in float32 or wider: they may leave the range of others."""
    total: Float[Array, "B T H"]
    """Sums of the weights in float32 or wider."""


def polynomial_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    coefficients: int | np.integer | Coefficients,
    scale: float | np.number | None = None,
    clamp: float | None = None,
    places: Places | None = None,
    log_forget: Float[Array, "B S H"] | None = None,
    implementation: Implementation = "auto",
    precision: Precision | None = None,
) -> PolynomialOutput:
    r"""Sum values with weights κ(min(scale q_i·k_j, clamp)) e^{Σ_{j<l≤i} log_forget_l}.

    κ(s) = Σ_{n<N} c_n s^n, or Taylor's Σ_{n<N} s^n / n!

    A key is visible to the queries of its document at its own place or after it. Cost: 2 H (K + V)
    FLOPs and N multiplications per pair forward, about 3.5 times that backward, which computes the
    weights of a tile again.

    Far below 0 the terms of Taylor's sum cancel. Where the sum equals e^s to rounding, which for
    N = 80 is down to s = -18 in float32, it is computed as 1 / κ(-s), with full precision; beyond
    that, float32 has no correct digit.

    Args:
      q: queries.
      k: keys.
      v: values.
      coefficients: c, or per head; a whole number N is Taylor's sum of N terms.
      scale: factor of the products, a finite number; None: 1/sqrt(K).
      clamp: largest scale q·k; the gradient is 0 above it. None: no limit.
      places: where queries and keys stand; None: in one row, T = S, all of one document.
      log_forget: logarithms of gates that a weight decays by on its way, by the slot of each key.
      implementation: `reference` takes query after query, power after power; `xla` tiles of pairs,
        with Horner's rule.
      precision: of the matrix products; None: JAX's default.

    Raises:
      ShapeError: shapes do not fit, heads or widths are none, or `xla` is given a symbolic number
        of tokens.
      DTypeError: an operand is not floating point, or documents are not integers.
      ConfigError: there is no coefficient, or scale or clamp is not a finite number.
      UnknownName: no such implementation or precision.
      KernelUnsupported: the named implementation does not exist here; there is no kernel.

    Reference: "On the Expressiveness of Softmax Attention" (arXiv 2507.23632), sec. 3;
      `softmax_taylor_80terms`, `softmax_learned_terms`.
    """
    op = "polynomial_attention"
    q, k, v, coefficients, places, log_forget = as_arrays(q, k, v, coefficients, places, log_forget)
    _check(q, k, v, places, log_forget)
    coefficients = int(coefficients) if isinstance(coefficients, np.integer) else coefficients
    _check_coefficients(coefficients, q.shape[2])
    check_clamp(op, clamp)
    check_precision(precision)
    scale = number_scale(op, scale, q.shape[3])
    choice = resolve(op, implementation, q, k, v)
    wide = at_least_float32(q).dtype
    decay = None
    if log_forget is not None and 0 not in log_forget.shape:
        slots = None if places is None else places.query
        decay = gates_at(finite_gates(log_forget, wide), slots)
    pairs = Pairs(q.astype(wide), k.astype(wide), v.astype(wide), decay, places)
    nothing = 0 in (q.shape[1], k.shape[1])
    if choice.plain == "reference" and not nothing:
        return _reference(pairs, coefficients, scale, clamp)
    _check_known(q, k)
    similarity = _clamped(_polynomial(coefficients, wide), clamp)
    options = {"scale": scale, "precision": precision}
    return PolynomialOutput(*similarity_sums(similarity, pairs, in_row=places is None, **options))


declare(polynomial_attention, xla=None, reference=None)


def _check(
    q: Array,
    k: Array,
    v: Array,
    places: Places | None,
    log_forget: Array | None,
) -> None:
    op = "polynomial_attention"
    check_floating(op, q=q, k=k, v=v, log_forget=log_forget)
    check_axes(op, "q", q, "B T H K")
    check_axes(op, "k", k, "B S H K")
    check_axes(op, "v", v, "B S H V")
    check_shape(op, "k", k, (q.shape[0], k.shape[1], *q.shape[2:]), "keys that fit q")
    check_shape(op, "v", v, (*k.shape[:3], v.shape[3]), "a value per key")
    check_shape(op, "log_forget", log_forget, k.shape[:3], "one gate per key and head")
    if places is None and q.shape[1] != k.shape[1]:
        raise ShapeError(
            f"{op}: {q.shape[1]} queries and {k.shape[1]} keys without `places`. "
            "Say where each stands, or pass rows of equal length."
        )
    if places is not None:
        check_documents(op, q.shape[:2], places.query_segment)
        check_documents(op, k.shape[:2], places.key_segment)


def _check_coefficients(coefficients: int | Array, heads: int) -> None:
    op = "polynomial_attention"
    if isinstance(coefficients, int):
        if coefficients < 1:
            raise ConfigError(f"{op}: Taylor's sum of {coefficients} terms. Use 1 or more.")
        return
    shape = jnp.shape(coefficients)
    if len(shape) not in (1, 2) or shape[1:] not in ((), (heads,)):
        raise ShapeError(
            f"{op}: coefficients have shape {shape}. Pass [N], or [N H] with H={heads}, or a "
            "whole number for the terms of Taylor's sum."
        )
    if shape[0] == 0:
        raise ConfigError(f"{op}: coefficients {shape} are none at all. Pass one or more.")


def _check_known(q: Array, k: Array) -> None:
    """Check that tiles of queries and keys can be counted."""
    lengths = (q.shape[1], k.shape[1])
    if not all(isinstance(length, int) for length in lengths):
        raise ShapeError(
            f"polynomial_attention: the numbers of queries and keys {lengths} are symbolic, and "
            "tiles of pairs must be counted. Export with fixed numbers of tokens, or use "
            "implementation='reference'."
        )


def _clamped(similarity: Similarity, clamp: float | None) -> Similarity:
    if clamp is None:
        return similarity
    # Not `minimum`, whose gradient at the limit itself is a half.
    return lambda s: similarity(jnp.where(s > clamp, clamp, s))


def _polynomial(coefficients: int | Array, dtype: np.dtype) -> Similarity:
    if isinstance(coefficients, int):
        return _taylor(coefficients, dtype)
    c = coefficients.astype(dtype)
    c = c.reshape(c.shape[0], -1, 1, 1)  # [N H|1 1 1] against products [B H T S]
    return lambda s: _horner(list(c), s)


def _horner(coefficients: list, s: Array) -> Array:
    value = jnp.zeros_like(s)
    for c in reversed(coefficients):
        value = value * s + c
    return value


def _taylor(terms: int, dtype: np.dtype) -> Similarity:
    limit = _exact_to(terms, dtype)

    def taylor(s: Array) -> Array:
        exact = (s < 0.0) & (s >= -limit)
        there = 1.0 / _taylor_sum(terms, jnp.where(exact, -s, 0.0))
        return jnp.where(exact, there, _taylor_sum(terms, jnp.where(exact, 0.0, s)))

    return taylor


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _taylor_sum(terms: int, s: Array) -> Array:
    """Return Σ_{n<N} s^n / n! as 1 + s (1 + s/2 (1 + s/3 ...)), whose factors stay in range.

    A loop, for 80 multiplications in a row compile for minutes on a CPU; and its derivative is the
    sum of a term less, so that none of them is kept.
    """

    def step(n: Array, value: Array) -> Array:
        return 1.0 + value * (s / (terms - 1 - n))

    return lax.fori_loop(0, terms - 1, step, vary_like(jnp.ones_like(s), s))


@_taylor_sum.defjvp
def _differentiate_taylor(terms: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    slope = _taylor_sum(terms - 1, primals[0]) if terms > 1 else jnp.zeros_like(primals[0])
    return _taylor_sum(terms, primals[0]), slope * tangents[0]


def _exact_to(terms: int, dtype: np.dtype) -> float:
    """Return the x up to which Taylor's sum at -x is e^{-x} to rounding, 0 if it never is.

    The remainder is at most x^N / N!, which must be a rounding of e^{-x}.
    """
    rounding = math.log(float(jnp.finfo(dtype).eps)) - math.log(4.0)
    x = np.linspace(1e-3, terms, 4096)
    remainder = terms * np.log(x) + x - math.lgamma(terms + 1)
    below = x[remainder < rounding]
    return float(below[-1]) if below.size else 0.0


def _reference(
    pairs: Pairs, coefficients: int | Array, scale: float, clamp: float | None
) -> PolynomialOutput:
    """Take one query after another, and add up powers one after another."""
    length = pairs.q.shape[1]
    places = pairs.places
    if places is None:
        index = jnp.broadcast_to(jnp.arange(length), pairs.q.shape[:2])
        places = Places(index, index, jnp.ones_like(index), jnp.ones_like(index))
    seen = visible(CAUSAL, places, places.query, places.key)  # [B T S]

    def step(_: None, t: Array) -> tuple[None, tuple[Array, Array]]:
        s = scale * jnp.einsum("bhk,bshk->bhs", pairs.q[:, t], pairs.k)
        if clamp is not None:
            s = jnp.where(s > clamp, clamp, s)
        weights = _powers(coefficients, s)
        if pairs.decay is not None:
            query, query_rest, key, key_rest = pairs.decay
            passed = query[:, :, t, None] - key + (query_rest[:, :, t, None] - key_rest)
            weights = weights * jnp.exp(jnp.where(seen[:, t][:, None], passed, -jnp.inf))
        weights = jnp.where(seen[:, t][:, None], weights, 0.0)
        return None, (jnp.einsum("bhs,bshv->bhv", weights, pairs.v), jnp.sum(weights, axis=-1))

    _, (y, total) = lax.scan(step, None, jnp.arange(length))
    return PolynomialOutput(jnp.moveaxis(y, 0, 1), jnp.moveaxis(total, 0, 1))


def _powers(coefficients: int | Array, s: Array) -> Array:
    """Return Σ_n c_n s^n [B H S]."""
    if isinstance(coefficients, int):

        def add(sums: tuple[Array, Array], n: Array) -> tuple[tuple[Array, Array], None]:
            term = sums[0] * s / n
            return (term, sums[1] + term), None

        ones = vary_like(jnp.ones_like(s), s)
        return lax.scan(add, (ones, ones), jnp.arange(1, coefficients, dtype=s.dtype))[0][1]
    c = coefficients.astype(s.dtype).reshape(coefficients.shape[0], -1, 1)
    return sum((c[n] * s**n for n in range(1, c.shape[0])), start=c[0] + 0.0 * s)
