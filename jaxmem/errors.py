"""Every error that a user can cause, with one message: what, found, expected, what to do."""

import difflib
from collections.abc import Iterable


class JaxmemError(Exception):
    """Base of all errors that jaxmem raises on purpose; the command line exits with 2 on it."""

    def __str__(self) -> str:
        """Return the bare message (KeyError would quote it)."""
        return str(self.args[0]) if self.args else ""


class ConfigError(JaxmemError, ValueError):
    """A configuration field, or a combination of them, makes no sense."""


class ShapeError(JaxmemError, ValueError):
    """An array has a shape that the called function cannot take."""


class DTypeError(JaxmemError, TypeError):
    """An array holds numbers of a kind that the called function cannot take."""


class UnknownName(JaxmemError, KeyError):
    """A name is not in its registry."""


class KernelUnsupported(JaxmemError, NotImplementedError):
    """The named implementation cannot run this call."""


class MissingExtra(JaxmemError, ImportError):
    """An optional dependency is needed and not installed."""


class CheckpointMismatch(JaxmemError, ValueError):
    """A run folder or checkpoint does not belong to what is asked for."""


class DataError(JaxmemError, RuntimeError):
    """A data source is missing, empty, unreadable or too small."""


class NonFiniteLoss(JaxmemError, FloatingPointError):
    """The training loss or a gradient became infinite or NaN."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Build the error for a misspelt ``name`` of some ``kind``, naming the nearest known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
    return UnknownName(f"Unknown {kind} {name!r}. {hint}")
