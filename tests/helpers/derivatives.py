"""Every way to differentiate a function, as one tree of results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def derivatives(function: Callable[..., Any], *operands: jax.Array) -> dict[str, Any]:
    """Return first and second derivatives of a scalar of all results, by each mode.

    The second ones are along a fixed direction: by forward over reverse, reverse over reverse, and
    reverse over forward, which are equal.
    """
    numbers = tuple(range(len(operands)))
    direction = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in operands)

    @jax.jit  # what all modes read is traced once
    def scalar(*operands: jax.Array) -> Any:
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(*operands)))

    grad = jax.jit(jax.grad(scalar, numbers))

    def along(*operands: jax.Array) -> Any:
        return jax.jvp(scalar, operands, direction)[1]

    def grad_along(*operands: jax.Array) -> Any:
        pairs = zip(grad(*operands), direction, strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    return {
        "jvp": along(*operands),
        "grad": grad(*operands),
        "jvp of grad": jax.jvp(grad, operands, direction)[1],
        "grad of grad": jax.grad(grad_along, numbers)(*operands),
        "grad of jvp": jax.grad(along, numbers)(*operands),
    }


def check_modes(found: dict[str, Any], assert_close: Callable[[Any, Any], None]) -> None:
    """Check that the modes agree with each other."""
    for name in ("grad of grad", "grad of jvp"):
        assert_close(found[name], found["jvp of grad"])
