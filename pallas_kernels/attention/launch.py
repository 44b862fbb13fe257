"""The shared memory of the attention kernels, and their tables."""

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
    forward kernel owns no values; float32 keys have (m + n) K e_k more, for three TF32 products.
    K and V are rounded to powers of two. The compiler reports at most this for the default table.
    """
    e_k, e_v = jnp.dtype(dtype).itemsize, jnp.dtype(value_dtype).itemsize
    key, value = power_of_two(width) * e_k, power_of_two(value_width) * e_v
    again = key if e_k == 4 else 0

    def program(owned: int, step: int, stages: int, own: int) -> int:
        walked = stages * step * (key + value + 16)
        return walked + owned * (own + 16) + (owned + step) * again

    q, k, stages = config.backward_q, config.backward_k, config.backward_stages
    return max(
        program(config.block_q, config.block_k, config.num_stages, key),
        program(q, k, stages, key + value),
        program(k, q, stages, key + value),
    )


KERNEL = PairKernel("attention", shared_bytes)
find_config, unmet = KERNEL.find_config, KERNEL.unmet
