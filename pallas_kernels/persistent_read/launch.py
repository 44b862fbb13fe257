"""Launch configurations of the persistent read, and what its kernels need."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _launch
from pallas_kernels._launch import power_of_two

KERNEL = "persistent_read"

_BUSY = 264
"""Programs that fill a large GPU: two for each of its 132 cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersistentReadConfig:
    """Tiles of the forward kernel and of the two backward kernels."""

    block_rows: int
    """Queries that a program of the forward kernel owns."""
    block_pairs: int
    """Stored pairs per step of the forward kernel."""
    num_warps: int
    """Warps of a program of the forward kernel."""
    num_stages: int
    """Loads in flight in the loop of the forward kernel."""
    backward_rows: int
    """Queries per tile of the backward kernels."""
    backward_pairs: int
    """Stored pairs per tile of the backward kernels."""
    backward_warps: int
    """Warps of a program of the backward kernels."""
    backward_stages: int
    """Loads in flight in the loops of the backward kernels."""


def find_config(
    dtype: Any, key_width: int, value_width: int, *, rows: int, tables: int
) -> PersistentReadConfig:
    """Look up the configuration of a call with this many queries and tables (heads by banks).

    Raises:
      LookupError: no entry fits the dtype and the widths; `unmet` says so before.
    """
    name, width = jnp.dtype(dtype).name, max(key_width, value_width)
    return _launch.lookup(KERNEL, PersistentReadConfig, name, width, rows, tables)


def unmet(
    q_dtype: Any,
    value_dtype: Any,
    key_width: int,
    value_width: int,
    *,
    rows: int,
    tables: int,
    config: PersistentReadConfig | None = None,
) -> str | None:
    """Say why the kernels cannot take a call, or None."""
    for dtype in (q_dtype, value_dtype):
        why = _launch.unmet(dtype, key_width, value_width)
        if why:
            return why
    try:
        config = config or find_config(q_dtype, key_width, value_width, rows=rows, tables=tables)
    except LookupError as error:  # no tiles of wide float32 heads fit the registers
        return str(error).rstrip(".")
    tiles = ("block_rows", "block_pairs", "backward_rows", "backward_pairs")
    odd = _launch.not_power_of_two(config, *tiles)
    if odd:
        return odd
    needed = shared_bytes(config, key_width, value_width, q_dtype, value_dtype)
    return _launch.too_much_shared(KERNEL, needed)


def shared_bytes(
    config: PersistentReadConfig, key_width: int, value_width: int, q_dtype: Any, value_dtype: Any
) -> int:
    """Return the shared memory of the hungriest of the three kernels, in bytes, from above.

    forward: s P (K e_q + V e_v) + M (K e_q + P e_v)
    queries' gradient: s P (K e_q + V e_v) + M (K + P) e_q + M V e_v
    tables' gradient: s M (K e_q + V e_v) + P (K + M) e_q + P (V + M) e_v
    with tiles of M queries and P pairs, s stages, and widths K, V rounded to powers of two.
    """
    e_q, e_v = jnp.dtype(q_dtype).itemsize, jnp.dtype(value_dtype).itemsize
    width, value = power_of_two(key_width), power_of_two(value_width)
    row = width * e_q + value * e_v
    m, p = config.block_rows, config.block_pairs
    forward = config.num_stages * p * row + m * (width * e_q + p * e_v)
    m, p, stages = config.backward_rows, config.backward_pairs, config.backward_stages
    queries = stages * p * row + m * row + m * p * e_q
    tables = stages * m * row + p * row + m * p * (e_q + e_v)
    return max(forward, queries, tables)


def splits(tables: int, pairs: int, rows: int, config: PersistentReadConfig) -> int:
    """Return over how many programs the queries of a block of pairs are shared.

    As many as keep a large GPU busy, at most one for every four tiles of queries: each split writes
    gradients of its own, which are added afterwards.
    """
    programs = tables * -(-pairs // config.backward_pairs)
    tiles = -(-rows // config.backward_rows)
    return max(1, min(-(-_BUSY // programs), tiles // 4))
