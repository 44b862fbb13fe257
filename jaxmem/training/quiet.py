"""Orbax says less: what it logs besides raising it, and what its background says after an error."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Keep Orbax from logging tracebacks of errors that it also raises."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def ignore_closed_loops() -> Callable[[], None]:
    """Drop what arrays under way say when they find Orbax's event loop closed.

    It closes the loop at the first error of one of them.

    Returns:
      What undoes this.
    """
    before = sys.unraisablehook

    def hook(event: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(event.exc_value):
            before(event)

    def undo() -> None:
        sys.unraisablehook = before

    sys.unraisablehook = hook
    return undo
