"""One process trains in a run folder at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxmem.errors import JaxmemError
from jaxmem.training.disk import disk_errors


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the file `lock` of a run folder; process 0 does so for all processes of the run.

    The kernel gives the lock back when the process ends, however it ends. The file stays: removing
    it would let two processes hold locks on two files of that name.

    Raises:
      JaxmemError: another process holds it, or the file cannot be written.
    """
    if jax.process_index():
        yield
        return
    path = folder / "lock"
    with disk_errors(path):
        file = path.open("a+", encoding="utf-8")
    with file:
        _take(file.fileno(), folder, path)
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _take(descriptor: int, folder: Path, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        owner = path.read_text(encoding="utf-8", errors="replace") or "unknown"
        raise JaxmemError(
            f"Another process ({owner}) trains in {folder}. Stop it, or choose another `run.dir`."
        ) from err
    except OSError:
        # Some network file systems have no locks; a run there must still be possible.
        return
