"""Gated linear attention on GPUs: a decaying matrix state per head, walked in chunks."""

from pallas_kernels.linear_attention.backward import linear_backward
from pallas_kernels.linear_attention.cases import cases
from pallas_kernels.linear_attention.forward import linear_forward
from pallas_kernels.linear_attention.launch import (
    NAME,
    LinearAttentionConfig,
    Operands,
    Outputs,
    find_config,
    unmet,
)

__all__ = [
    "NAME",
    "LinearAttentionConfig",
    "Operands",
    "Outputs",
    "cases",
    "find_config",
    "linear_backward",
    "linear_forward",
    "unmet",
]
