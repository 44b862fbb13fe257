"""Linear functions with a transpose of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

Tangents = TypeVar("Tangents")
Outputs = TypeVar("Outputs")


def linear_map(
    apply: Callable[[Tangents], Outputs],
    transpose: Callable[[Outputs], Tangents],
    tangents: Tangents,
) -> Outputs:
    """Return apply(tangents), a linear function whose transpose is known to be `transpose`.

    In a tangent rule of `custom_jvp` it lets the backward pass be written by hand, where JAX's
    transpose of a loop would add a whole array per step, and keeps all other derivatives: forward
    mode and derivatives of the second order go through `apply`, which is plain JAX.

    y = L t is written as the solution x of A x = (t, 0) with A (t, y) = (t, y - L t), because
    `lax.custom_linear_solve` is JAX's only linear function with a given transpose that also maps
    and differentiates. It wants to know the tangents of all of a right-hand side or of none, so
    every part is made to depend on every tangent, on paper: XLA drops that.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(apply, tangents))

    def matvec(x: tuple[Tangents, Outputs]) -> Any:
        moved = apply(x[0])
        return _tied(x[0], moved), jax.tree.map(jnp.subtract, x[1], moved)

    def solve(_: Any, b: tuple[Tangents, Outputs]) -> Any:
        return b[0], jax.tree.map(jnp.add, b[1], apply(b[0]))

    def transpose_solve(_: Any, b: tuple[Tangents, Outputs]) -> Any:
        return jax.tree.map(jnp.add, b[0], transpose(b[1])), b[1]

    right = _tied((tangents, zeros), tangents)
    return lax.custom_linear_solve(matvec, right, solve, transpose_solve)[1]


def known_tangents(tangents: Any) -> Any:
    """Return the tangents that a rule with `symbolic_zeros=True` gets, with None for zeros."""
    zero = jax.custom_derivatives.SymbolicZero
    return jax.tree.map(
        lambda a: None if isinstance(a, zero) else a,
        tangents,
        is_leaf=lambda a: isinstance(a, zero),
    )


def _tied(values: Any, tangents: Any) -> Any:
    """Return the values, as if each depended on all of the tangents."""
    one = sum(leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(tangents))

    def tied(value: Array) -> Array:
        never = jnp.broadcast_to(one, value.shape).astype(value.dtype)
        return value + jnp.where(False, never, jnp.zeros_like(value))

    return jax.tree.map(tied, values)
