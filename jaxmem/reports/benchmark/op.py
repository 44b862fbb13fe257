"""How an op is measured: its operands, what is called, what it must at least do, and at what."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmem.reports.benchmark.work import Work

Shape = dict[str, int]
"""Sizes by their letters (see `jaxmem.shapes`)."""
Form = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """A use of an op and how it is measured."""

    name: str
    draw: Callable[[np.random.Generator, Shape], dict[str, np.ndarray]]
    """Operands by name, float32, never zeros."""
    call: Callable[..., Any]
    """(*operands, implementation=) -> result."""
    exact: Form
    work: Callable[[Shape, int], Work]
    """From the shape and the bytes per element."""
    shapes: tuple[Shape, ...]
    small: tuple[Shape, ...]
    """For a CPU."""
    baselines: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    gpu_baselines: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    """Those that run on a GPU only; they may refuse a call with ImportError or ValueError."""
    variant: str = ""
    """Which use of the op; empty for the main one."""
    float32: tuple[str, ...] = ()
    """Operands that stay float32 whatever the dtype, beside per-head scalars."""
    implementations: tuple[str, ...] | None = None
    """Those that are measured; None: all."""

    @property
    def label(self) -> str:
        """Name and variant."""
        return f"{self.name}, {self.variant}" if self.variant else self.name
