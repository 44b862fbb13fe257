"""Softmax over stored pairs, in blocks: the weights of (queries, pairs) are never in memory."""

from pallas_kernels.persistent_read._tiles import Operands, Saved
from pallas_kernels.persistent_read.backward import queries_gradient, tables_gradient
from pallas_kernels.persistent_read.forward import forward
from pallas_kernels.persistent_read.launch import PersistentReadConfig, find_config, unmet

__all__ = [
    "Operands",
    "PersistentReadConfig",
    "Saved",
    "find_config",
    "forward",
    "queries_gradient",
    "tables_gradient",
    "unmet",
]
