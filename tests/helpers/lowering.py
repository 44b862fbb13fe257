"""What a lowered program holds: shown without a GPU."""

import re
from typing import Any

from pallas_kernels._launch import Entry, entries

KERNEL_CALL = "__gpu$xla.gpu.triton"


def launches(kernel: str, device: str = "default") -> list[Entry]:
    """Return the entries of a table, and the first of each dtype for the narrowest heads."""
    table = entries(kernel, device)
    first = {entry.dtype: entry for entry in reversed(table)}
    narrow = [entry._replace(width=16) for entry in first.values()]
    return table + [entry for entry in narrow if entry not in table]


def kernel_names(lowered: Any) -> list[str]:
    """Return the names of the Triton kernels that a lowered program calls, in order."""
    text = lowered.as_text()
    calls = [line for line in text.splitlines() if KERNEL_CALL in line]
    found = [re.search(r'name = "([^"]+)"', line) for line in calls]
    return [match[1] if match else "?" for match in found]
