"""Gated scan on GPUs: a linear recurrence with a gate per token and channel."""

from pallas_kernels.gated_scan.backward import gated_scan_backward
from pallas_kernels.gated_scan.cases import cases
from pallas_kernels.gated_scan.forward import gated_scan_forward
from pallas_kernels.gated_scan.launch import NAME, GatedScanConfig, find_config, unmet
from pallas_kernels.gated_scan.steps import DECAY, PADDING, RESET, GradInputs, Inputs

__all__ = [
    "DECAY",
    "NAME",
    "PADDING",
    "RESET",
    "GatedScanConfig",
    "GradInputs",
    "Inputs",
    "cases",
    "find_config",
    "gated_scan_backward",
    "gated_scan_forward",
    "unmet",
]
