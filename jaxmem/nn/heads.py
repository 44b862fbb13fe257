"""Splitting a width over heads: the checks, and the reshape both ways."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxmem.errors import ConfigError


def check_heads(dim: int, num_heads: int, path: str) -> None:
    """Raise ConfigError unless `num_heads` is positive and divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
        raise ConfigError(
            f"{path}.num_heads={num_heads} does not divide model.dim={dim}. "
            f"Use one of {', '.join(map(str, divisors))}."
        )


def check_even_heads(dim: int, num_heads: int, path: str) -> None:
    """Raise ConfigError unless `num_heads` divides `dim` into even widths, as rope needs them."""
    check_heads(dim, num_heads, path)
    if (dim // num_heads) % 2:
        raise ConfigError(
            f"{path}.num_heads={num_heads} makes heads of {dim // num_heads} channels, which rope "
            "cannot turn in pairs. Use an even head width."
        )


def split_heads(x: Float[Array, "B T D"], num_heads: int) -> Float[Array, "B T H K"]:
    """Give head h the channels h·K to (h+1)·K."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def split_qkv(
    x: Float[Array, "B T E"], num_heads: int
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Cut a joint projection into queries, keys and values, each split over its heads."""
    q, k, v = jnp.split(x, 3, axis=-1)
    return split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)


def merge_heads(x: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
    """Undo `split_heads`."""
    return x.reshape(*x.shape[:2], -1)
