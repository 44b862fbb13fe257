"""Splitting a width over heads: the check, and the reshape both ways."""

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


def split_heads(x: Float[Array, "B T D"], num_heads: int) -> Float[Array, "B T H K"]:
    """Give head h the channels h·K to (h+1)·K."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def merge_heads(x: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
    """Undo `split_heads`."""
    return x.reshape(*x.shape[:2], -1)
