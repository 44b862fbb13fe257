"""What a lowered program holds: shown without a GPU."""

import re
from typing import Any

KERNEL_CALL = "__gpu$xla.gpu.triton"


def kernel_names(lowered: Any) -> list[str]:
    """Return the names of the Triton kernels that a lowered program calls, in order."""
    text = lowered.as_text()
    calls = [line for line in text.splitlines() if KERNEL_CALL in line]
    found = [re.search(r'name = "([^"]+)"', line) for line in calls]
    return [match[1] if match else "?" for match in found]
