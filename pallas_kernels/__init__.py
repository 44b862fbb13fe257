"""Pallas GPU kernels, lowered through Triton: arrays in, arrays out; nothing here knows a model.

Each kernel has a folder with the same files: `forward.py`, `backward.py`, `launch.py` (launch
configuration and preflight) and `cases.py` (operands for lowering and compilation tests). The ops
in `jaxmem.ops` check arguments, define gradients and choose between a kernel and its XLA form.
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Return the names of all kernels, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def cases_of(kernel: str) -> ModuleType:
    """Return the module of a kernel that builds its cases."""
    return importlib.import_module(f"{__name__}.{kernel}.cases")
