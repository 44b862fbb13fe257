"""Where kernels run compiled, and where they are interpreted."""

from pallas_kernels._compat import default_platform


def on_cpu() -> bool:
    """Return whether what is traced now runs on a CPU unless its arrays say otherwise."""
    return default_platform() == "cpu"


def interpreted(interpret: bool | None = None) -> bool:
    """Return whether a kernel traced now is interpreted: as asked, or where it runs on a CPU.

    Interpreted kernels show that the mathematics is right; they are slow and never a benchmark.
    """
    return on_cpu() if interpret is None else interpret
