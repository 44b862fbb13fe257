"""How the leaky-average kernels are launched, and which calls they cannot take."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _launch

NAME = "leaky_average"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakyAverageConfig:
    """Launch configuration of the forward and the backward kernels."""

    chunk: int = 64
    """Tokens that one matrix product covers, a power of two from 16."""
    block: int = 64
    """Most channels of a head that one program owns, a power of two from 16."""
    programs: int = 264
    """Programs to aim for; time is split where batch, heads and channels give fewer."""
    span: int = 256
    """Fewest tokens that are worth a program of their own when time is split."""
    num_warps: int = 4
    """Warps per program."""
    num_stages: int = 3
    """Tiles in flight per program."""


class Layout(NamedTuple):
    """The grid of a call: which part of the array a program owns."""

    block: int
    """Channels per program."""
    blocks: int
    """Programs along the channels of a head."""
    span: int
    """Tokens per program, a whole number of chunks."""
    splits: int
    """Programs along time."""

    @property
    def ends(self) -> int:
        """Rows of the arrays that hold one row per split; tiles are powers of two."""
        return _launch.power_of_two(self.splits, least=2)


def find_config(dtype: Any, shape: tuple[int, ...]) -> LeakyAverageConfig:
    """Return the configuration of the tables for inputs [B, T, H, K]."""
    batch, length, heads, width = shape
    name = jnp.dtype(dtype).name
    return _launch.lookup(NAME, LeakyAverageConfig, name, width, length, batch * heads)


def layout(config: LeakyAverageConfig, shape: tuple[int, ...]) -> Layout:
    """Choose the grid for inputs [B, T, H, K]."""
    batch, length, heads, width = shape
    block = min(config.block, _launch.power_of_two(width))
    blocks = -(-width // block)
    wanted = round(config.programs / (batch * heads * blocks))
    splits = max(1, min(wanted, length // max(config.span, config.chunk)))
    span = -(-length // (splits * config.chunk)) * config.chunk
    return Layout(block, blocks, span, -(-length // span))


def unmet(x: Any, rate: Any, *, config: LeakyAverageConfig | None = None) -> str | None:
    """Say which condition of the kernels a call does not meet, or None.

    Args:
      x: inputs [B, T, H, K], or their shape and dtype.
      rate: rates [H]; they do not matter here.
      config: launch configuration; None takes that of the tables.
    """
    del rate
    reason = _launch.unmet(x.dtype, x.shape[-1])
    if reason is not None:
        return reason
    config = config or find_config(x.dtype, x.shape)
    odd = _launch.not_power_of_two(config, "chunk", "block")
    if odd:
        return odd
    return _launch.too_much_shared(NAME, shared_bytes(config, x.dtype, x.shape[-1]))


def shared_bytes(config: LeakyAverageConfig, dtype: Any, width: int) -> int:
    """Return an upper bound of the shared memory of a program, in bytes.

    e (2 C² + P C (s + 1)) at e bytes a number: the matrix of decays, in two parts, and tiles [C, P]
    of inputs, s of them on their way.
    """
    size = jnp.dtype(dtype).itemsize
    block = min(config.block, _launch.power_of_two(width))
    return size * config.chunk * (2 * config.chunk + block * (config.num_stages + 1))
