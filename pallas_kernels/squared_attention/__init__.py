"""Squared attention in tiles: weights (q·k)² with decay, summed and never in memory."""

from pallas_kernels.squared_attention._tiles import Operands, Outputs
from pallas_kernels.squared_attention.backward import squared_backward
from pallas_kernels.squared_attention.forward import squared_forward
from pallas_kernels.squared_attention.launch import (
    KERNEL,
    find_config,
    unmet,
)

__all__ = [
    "KERNEL",
    "Operands",
    "Outputs",
    "find_config",
    "squared_backward",
    "squared_forward",
    "unmet",
]
