"""How the linear-attention kernels are launched, and which calls they cannot take."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _launch
from pallas_kernels._launch import power_of_two

NAME = "linear_attention"


class Operands(NamedTuple):
    """What linear attention takes, and in the backward pass the gradients of that."""

    q: Any
    """Queries [B T G K], any T >= 1; G divides H."""
    k: Any
    """Keys [B T G K], zero at padding."""
    v: Any
    """Values [B T H V], zero at padding."""
    log_decay: Any
    """g [B T H], zero at padding; positive ones let the state grow, within float32. None: nothing
    is forgotten."""
    document: Any
    """Number of the document of each token [B T], int32, non-decreasing; 0 continues that of the
    state. None: all do. It has no gradient."""
    memory: Any
    """S before the first token [B H K V], float32."""
    key_sum: Any
    """z before the first token [B H K], float32; None: no totals."""


class Outputs(NamedTuple):
    """What linear attention returns, and in the backward pass the cotangents of that."""

    y: Any
    """[B T H V] in the dtype of v (float32 for float16, which it may exceed)."""
    total: Any
    """[B T H], float32; None without `key_sum`."""
    memory: Any
    """S after the last token, of its document [B H K V], float32."""
    key_sum: Any
    """z after the last token [B H K], float32, or None."""


class Tiling(NamedTuple):
    """How one walk is launched."""

    chunk: int
    block: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """Launch configuration of the forward walk and of the three backward walks."""

    chunk: int = 64
    """Tokens that the forward walk takes at a time, a power of two from 16 to 128."""
    block: int = 64
    """Most columns of the result that a program of it owns, a power of two from 16."""
    num_warps: int = 4
    """Warps of a program of it."""
    num_stages: int = 2
    """Chunks in flight in it."""
    backward_chunk: int = 64
    """Tokens that a backward walk takes at a time."""
    backward_block: int = 64
    """Most columns of the result that a program of it owns."""
    backward_warps: int = 4
    """Warps of a program of it."""
    backward_stages: int = 2
    """Chunks in flight in it."""

    @property
    def forward(self) -> Tiling:
        """The launch of the forward walk."""
        return Tiling(self.chunk, self.block, self.num_warps, self.num_stages)

    @property
    def backward(self) -> Tiling:
        """The launch of each backward walk."""
        return Tiling(
            self.backward_chunk, self.backward_block, self.backward_warps, self.backward_stages
        )


MAX_CHUNK = 128
"""Most tokens of a chunk: the coarse words of more gates might not add up exactly."""


def operand_dtype(*dtypes: Any) -> str:
    """Return the dtype of the operands of products: bfloat16 if all are that, else float32."""
    half = all(jnp.dtype(dtype) == jnp.bfloat16 for dtype in dtypes)
    return "bfloat16" if half else "float32"


def find_config(q: Any, k: Any, v: Any) -> LinearAttentionConfig:
    """Return the configuration of the tables for q, k [B, T, G, K] and v [B, T, H, V]."""
    batch, length, heads, value_width = v.shape
    dtype, width = operand_dtype(q.dtype, k.dtype, v.dtype), max(q.shape[-1], value_width)
    return _launch.lookup(NAME, LinearAttentionConfig, dtype, width, length, batch * heads)


def unmet(q: Any, k: Any, v: Any, *, config: LinearAttentionConfig | None = None) -> str | None:
    """Say which condition of the kernels a call does not meet, or None.

    Args:
      q: queries [B, T, G, K], or their shape and dtype.
      k: keys [B, T, G, K], alike.
      v: values [B, T, H, V], alike.
      config: launch configuration; None takes that of the tables.
    """
    for operand in (q, k, v):
        reason = _launch.unmet(operand.dtype, operand.shape[-1])
        if reason is not None:
            return reason
    try:
        config = config or find_config(q, k, v)
    except LookupError as error:
        return str(error).rstrip(".")
    odd = _launch.not_power_of_two(config, "chunk", "block", "backward_chunk", "backward_block")
    if odd:
        return odd
    longest = max(config.chunk, config.backward_chunk)
    if longest > MAX_CHUNK:
        return f"its configuration has chunks of {longest} tokens, more than {MAX_CHUNK}"
    dtype = operand_dtype(q.dtype, k.dtype, v.dtype)
    return _launch.too_much_shared(NAME, shared_bytes(config, q.shape[-1], v.shape[-1], dtype))


def shared_bytes(config: LinearAttentionConfig, width: int, value_width: int, dtype: Any) -> int:
    """Return the shared memory of the hungriest of the walks, in bytes, from above.

    A walk with queries and keys [C W] and values [C P], s chunks in flight, has
    e (s C (2 W + P) + C² + W P), for the tiles, the weights and the state as operands. W and P are
    powers of two.
    """
    size = jnp.dtype(dtype).itemsize
    key, value = power_of_two(width), power_of_two(value_width)

    def walk(tiling: Tiling, wide: int, columns: int) -> int:
        block = min(tiling.block, columns)
        tiles = tiling.num_stages * tiling.chunk * (2 * wide + block)
        return size * (tiles + tiling.chunk**2 + wide * block)

    return max(
        walk(config.forward, key, value),
        walk(config.backward, key, value),
        walk(config.backward, value, key),
    )
