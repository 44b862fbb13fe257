"""Where kernels run compiled, and where they are interpreted."""

import jax

from pallas_kernels._compat import target


def on_cpu() -> bool:
    """Return whether what is traced now runs on a CPU, rather than a device or a stand-in."""
    return target() is None and jax.default_backend() == "cpu"


def interpreted(interpret: bool | None = None) -> bool:
    """Return whether a kernel traced now is interpreted: as asked, or where there is no GPU.

    Interpreted kernels show that the mathematics is right; they are slow and never a benchmark.
    """
    return on_cpu() if interpret is None else interpret
