"""Launch configurations of squared attention, and what its kernels need."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _launch
from pallas_kernels._launch import power_of_two

NAME = "squared_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredAttentionConfig:
    """Tiles of the forward kernel and of the two backward kernels."""

    block_q: int
    """Queries that a program of the forward kernel owns."""
    block_k: int
    """Keys per step of the forward kernel."""
    num_warps: int
    """Warps of a program of the forward kernel."""
    num_stages: int
    """Loads in flight in the loop of the forward kernel."""
    backward_q: int
    """Queries per tile of the backward kernels."""
    backward_k: int
    """Keys per tile of the backward kernels."""
    backward_warps: int
    """Warps of a program of the backward kernels."""
    backward_stages: int
    """Loads in flight in the loops of the backward kernels."""


def find_config(
    dtype: Any, width: int, value_width: int, *, length: int, rows: int
) -> SquaredAttentionConfig:
    """Look up the configuration of a call with this many tokens, and rows times heads.

    Raises:
      LookupError: no entry fits the dtype and the widths; `unmet` says so before.
    """
    name = jnp.dtype(dtype).name
    return _launch.lookup(NAME, SquaredAttentionConfig, name, max(width, value_width), length, rows)


def unmet(
    dtype: Any,
    value_dtype: Any,
    width: int,
    value_width: int,
    *,
    length: int,
    rows: int,
    config: SquaredAttentionConfig | None = None,
) -> str | None:
    """Say why the kernels cannot take a call, or None; `dtype` is that of queries and keys."""
    for each in (dtype, value_dtype):
        why = _launch.unmet(each, width, value_width)
        if why:
            return why
    try:
        config = config or find_config(dtype, width, value_width, length=length, rows=rows)
    except LookupError as error:
        return str(error).rstrip(".")
    odd = _launch.not_power_of_two(config, "block_q", "block_k", "backward_q", "backward_k")
    if odd:
        return odd
    needed = shared_bytes(config, width, value_width, dtype, value_dtype)
    return _launch.too_much_shared(NAME, needed)


def shared_bytes(
    config: SquaredAttentionConfig, width: int, value_width: int, dtype: Any, value_dtype: Any
) -> int:
    """Return the shared memory of the hungriest of the three kernels, in bytes, from above.

    A program that owns m rows and walks over tiles of n, s of them in flight, has
    s n (K e_k + V e_v) + m (K e_k + V e_v) + 16 (m + s n), the last for numbers per row; the
    forward kernel owns no values; cotangents of float16 values are float32. Float32 keys have
    (m + n) K e_k more, for three TF32 products, and float16 tiles n K e_k or n V e_v, widened.
    K and V are rounded to powers of two. The compiler reports at most this for the default table.
    """
    e_k, e_v = jnp.dtype(dtype).itemsize, jnp.dtype(value_dtype).itemsize
    key, value = power_of_two(width) * e_k, power_of_two(value_width) * e_v
    halves = jnp.float16 in (jnp.dtype(dtype), jnp.dtype(value_dtype))
    again, widened = key if e_k == 4 else 0, max(key, value) if halves else 0
    cotangent = value * 2 if jnp.dtype(value_dtype) == jnp.float16 else value

    def program(owned: int, step: int, stages: int, own: int, walked: int) -> int:
        rows = owned * (own + 16) + stages * step * (walked + 16)
        return rows + (owned + step) * again + step * widened

    q, k, stages = config.backward_q, config.backward_k, config.backward_stages
    return max(
        program(config.block_q, config.block_k, config.num_stages, key, key + value),
        program(q, k, stages, key + cotangent, key + value),
        program(k, q, stages, key + value, key + cotangent),
    )
