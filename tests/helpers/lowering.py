"""What a lowered program holds: shown without a GPU."""

from typing import Any

from pallas_kernels import _lock
from pallas_kernels._compat import kernel_texts
from pallas_kernels._launch import Entry


def kernel_names(lowered: Any) -> list[str]:
    """Return the names of the Triton kernels that a lowered program calls, in order."""
    return [name for name, _ in kernel_texts(lowered)]


def locked_names(kernel: str, entry: Entry) -> list[tuple[str, list[str]]]:
    """Return each case of an entry and the names of its kernels, as the lock file has them.

    `tests/unit/kernels/test_lock.py` lowers every case and compares the names with the file.
    """
    rows = _lock.read(kernel, "default").rows
    calls = [call for call in _lock.calls(kernel, "default") if call.entry == entry]
    keys = [(call.case.name, _lock.key(call, _lock.DEVICES[0])) for call in calls]
    assert all(key in rows for _, key in keys), _lock.misplaced(kernel, "default")
    return [(name, list(rows[key].kernels)) for name, key in keys]
