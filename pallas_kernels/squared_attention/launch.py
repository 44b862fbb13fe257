"""The shared memory of the kernels of squared attention, and their tables."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels._launch import power_of_two
from pallas_kernels.pairs import PairKernel, PairTiles


def shared_bytes(
    config: PairTiles, width: int, value_width: int, dtype: Any, value_dtype: Any
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


KERNEL = PairKernel("squared_attention", shared_bytes)
find_config, unmet = KERNEL.find_config, KERNEL.unmet
