"""Softmax attention in tiles: the weights of (queries, keys) are never in memory."""

from pallas_kernels.attention._tiles import Operands, Rule, Saved, needed_blocks
from pallas_kernels.attention.backward import keys_gradient, queries_gradient
from pallas_kernels.attention.forward import forward
from pallas_kernels.attention.launch import find_config, unmet

__all__ = [
    "Operands",
    "Rule",
    "Saved",
    "find_config",
    "forward",
    "keys_gradient",
    "needed_blocks",
    "queries_gradient",
    "unmet",
]
