"""Asking a run to stop: SIGTERM and SIGINT finish the current update, save, and end the run."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: try again)."""

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the first signal asks the run to stop; a second one acts as usual."""

    def __init__(self) -> None:
        self._name = ""
        self._before: dict[signal.Signals, Handler] = {}

    @property
    def name(self) -> str:
        """Name of the signal that asked, empty if none did."""
        return self._name

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; a run in another thread cannot be asked by signal.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agreed(self, step: int, every: int) -> bool:
        """Say whether to stop before this update; all processes get the same answer.

        Args:
          step: updates done.
          every: with several processes, how often they ask each other.
        """
        if jax.process_count() == 1:
            return bool(self._name)
        if step % every:
            return False
        from jax.experimental.multihost_utils import process_allgather

        return bool(np.any(process_allgather(np.array(bool(self._name)))))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
