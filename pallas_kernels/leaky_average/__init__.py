"""Leaky average on GPUs: a decaying sum per head with one rate for all tokens."""

from pallas_kernels.leaky_average.backward import leaky_sums_backward
from pallas_kernels.leaky_average.cases import cases
from pallas_kernels.leaky_average.forward import leaky_sums_forward
from pallas_kernels.leaky_average.launch import NAME, LeakyAverageConfig, find_config, unmet
from pallas_kernels.leaky_average.tiles import Clock, GradInputs, Inputs

__all__ = [
    "NAME",
    "Clock",
    "GradInputs",
    "Inputs",
    "LeakyAverageConfig",
    "cases",
    "find_config",
    "leaky_sums_backward",
    "leaky_sums_forward",
    "unmet",
]
