"""Errors of the file system, turned into one message; and files that are never half written."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmem.errors import JaxmemError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The array store behind Orbax reports a full disk in words only.
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error, or one that it was raised from, means that nothing more fits."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, or a path that may not be written, into one message.

    Raises:
      JaxmemError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except JaxmemError:
        raise
    except Exception as err:
        if is_disk_full(err):
            _silence_consequences()
            raise JaxmemError(
                f"The disk is full: {path} could not be written. Checkpoints written before "
                "are intact; free some space and start the same command again."
            ) from err
        if isinstance(err, PermissionError | NotADirectoryError | FileExistsError):
            raise JaxmemError(
                f"{path} cannot be written ({err.strerror}). Choose another `run.dir`."
            ) from err
        raise


def _silence_consequences() -> None:
    """Keep what a full disk makes of the writers in the background from the terminal.

    Orbax leaves futures behind that nobody waits for; asyncio tells of each when Python ends.
    """
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    text = record.getMessage()
    return not (
        "exception was never retrieved" in text
        or any(words in text for words in _FULL_WORDS)
        or (error is not None and is_disk_full(error))
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers, and a kill at any moment, see the old or the new text whole."""
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
