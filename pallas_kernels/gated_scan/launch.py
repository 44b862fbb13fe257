"""How the gated-scan kernels are launched, and which calls they cannot take."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _launch

NAME = "gated_scan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedScanConfig:
    """Launch configuration of the forward and the backward kernels."""

    rows: int = 16
    """Tokens whose loads are issued together, before the steps that depend on each other."""
    block: int = 64
    """Most channels that one program owns, a power of two from 16."""
    programs: int = 1056
    """Programs to aim for; time is split where batch and channels give fewer.

    Several per core: only then are enough loads on their way to keep the memory busy.
    """
    span: int = 256
    """Fewest tokens that are worth a program of their own when time is split."""
    num_warps: int = 2
    """Warps per program."""
    num_stages: int = 1
    """Tiles in flight per program; loads are issued ahead by hand."""


class Layout(NamedTuple):
    """The grid of a call: which part of the array a program owns."""

    block: int
    """Channels per program."""
    blocks: int
    """Programs along the channels."""
    span: int
    """Tokens per program, a whole number of row blocks."""
    splits: int
    """Programs along time."""


def find_config(dtype: Any, shape: tuple[int, ...]) -> GatedScanConfig:
    """Return the configuration of the tables for inputs [B, T, D].

    The tables know widths up to that of the widest head, for a program owns a block of channels;
    their rows are blocks of 64 channels.
    """
    batch, length, width = shape
    name = jnp.dtype(dtype).name
    known = min(width, _launch.MAX_WIDTH)
    return _launch.lookup(NAME, GatedScanConfig, name, known, length, batch * -(-width // 64))


def layout(config: GatedScanConfig, shape: tuple[int, ...]) -> Layout:
    """Choose the grid for inputs [B, T, D]."""
    batch, length, width = shape
    block = min(config.block, _launch.power_of_two(width))
    blocks = -(-width // block)
    wanted = round(config.programs / (batch * blocks))
    splits = max(1, min(wanted, length // max(config.span, config.rows)))
    span = -(-length // (splits * config.rows)) * config.rows
    return Layout(block, blocks, span, -(-length // span))


def unmet(x: Any, log_decay: Any, *, config: GatedScanConfig | None = None) -> str | None:
    """Say which condition of the kernels a call does not meet, or None.

    Args:
      x: inputs [B, T, D], or their shape and dtype.
      log_decay: logarithms of the gates, alike.
      config: launch configuration; None takes that of the tables.
    """
    for operand in (x, log_decay):
        reason = _launch.unmet(operand.dtype, 1)
        if reason is not None:
            return reason
    config = config or find_config(x.dtype, x.shape)
    if config.rows < 1 or config.programs < 1:
        return f"its configuration has rows={config.rows} and programs={config.programs}, below 1"
    return _launch.not_power_of_two(config, "block")
