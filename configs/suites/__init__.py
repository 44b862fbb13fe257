"""The suites of `experiments.sweep`: one file each, found like the presets.

A docstring begins with the purpose in one line; later lines ``Source:``, ``Time:`` and ``Result:``
each start a paragraph of their own. The file defines ``suite = Suite(...)``.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import configs
from jaxmem.errors import ConfigError, unknown_name
from jaxmem.reports.sweep_suite import Suite

_FOLDER = Path(__file__).parent


class Description(NamedTuple):
    """What a suite's docstring says."""

    name: str
    purpose: str
    time: str


def names() -> list[str]:
    """Return the names of all suites, sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if not p.stem.startswith("_"))


def describe(name: str) -> Description:
    """Read a suite's docstring; nothing is imported.

    Raises:
      UnknownName: there is no such suite.
    """
    if name not in names():
        raise unknown_name("suite", name, names())
    fields = configs.paragraphs(_FOLDER / f"{name}.py")
    return Description(name, fields.get("purpose", ""), fields.get("time", ""))


def load(name_or_path: str) -> Suite:
    """Load a suite by name, or a ``.py`` file that defines ``suite``.

    Raises:
      UnknownName: there is no suite of that name.
      ConfigError: the file is missing, raises an error, or defines no suite.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        if name_or_path not in names():
            raise unknown_name("suite", name_or_path, names())
        return _suite(importlib.import_module(f"configs.suites.{name_or_path}"))
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. Give --suite a suite's name or a file.")
    return _suite(configs.run_file(path))


def _suite(module: ModuleType) -> Suite:
    suite = getattr(module, "suite", None)
    if not isinstance(suite, Suite):
        raise ConfigError(f"{module.__file__} does not define `suite = Suite(...)`.")
    return suite
