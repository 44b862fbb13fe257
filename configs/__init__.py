"""The presets: one file each, found by name, described by their docstring without being imported.

A docstring begins with the purpose in one line; later lines ``Source:``, ``Parameters:``,
``Time:`` and ``Result:`` each start a paragraph of their own.
"""

import ast
import dataclasses
import importlib
import importlib.util
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from jaxmem.errors import ConfigError, JaxmemError, UnknownName, unknown_name

if TYPE_CHECKING:
    from jaxmem.training.config import RunConfig

_FOLDER = Path(__file__).parent


class Description(NamedTuple):
    """What a preset's docstring says."""

    name: str
    purpose: str
    parameters: str
    time: str
    source: str
    result: str


def names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if not p.stem.startswith("_"))


def describe(name: str) -> Description:
    """Read a preset's docstring; nothing is imported.

    Raises:
      UnknownName: there is no such preset.
    """
    if name not in names():
        raise _unknown(name)
    fields = paragraphs(_FOLDER / f"{name}.py")
    return Description(name, *(fields.get(field, "") for field in Description._fields[1:]))


def paragraphs(path: Path) -> dict[str, str]:
    """Read the docstring of a file without importing it: its purpose, and what has a head."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    fields: dict[str, str] = {}
    paragraph = "purpose"
    for line in text.splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in ("Source", "Parameters", "Time", "Result"):
            paragraph, line = head.lower(), rest
        elif not line.strip():
            paragraph = ""
        fields[paragraph] = f"{fields.get(paragraph, '')} {line.strip()}".strip()
    return fields


def load(name_or_path: str) -> "RunConfig":
    """Load a preset by name, a ``.py`` file that defines ``config``, or a saved ``.json``.

    A preset without ``run.name`` gets the name of its file.

    Raises:
      UnknownName: there is no preset of that name.
      ConfigError: the file is missing, raises an error, or is not a configuration.
    """
    path = Path(name_or_path)
    if path.suffix not in (".py", ".json"):
        if name_or_path not in names():
            raise _unknown(name_or_path)
        return _named(importlib.import_module(f"configs.{name_or_path}"), name_or_path)
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. Give --config a preset's name or a file.")
    if path.suffix == ".py":
        return _named(run_file(path), path.stem)
    from jaxmem.training.config import from_json

    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}. Give a saved config.json.") from error
    return from_json(text, name=str(path))


def run_file(path: Path) -> ModuleType:
    """Run a file of the user.

    Raises:
      ConfigError: it raised something; the message names its line.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _is(f, path)]
        what = str(error)
        if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
            lines, what = [error.lineno], error.msg
        where = f", line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, JaxmemError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"{path}{where}: {kind}{what.rstrip('.')}. Mend the file; --debug shows the traceback."
        ) from error
    return module


def _is(frame: traceback.FrameSummary, path: Path) -> bool:
    return frame.filename == str(path.absolute())


def _unknown(name: str) -> UnknownName:
    return UnknownName(f"{unknown_name('config', name, names())} --list shows all.")


def _named(module: ModuleType, name: str) -> "RunConfig":
    """Return the module's ``config``, its run called ``name`` if it has no name of its own."""
    from jaxmem.training.config import RunConfig

    config = getattr(module, "config", None)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{module.__file__} does not define `config = RunConfig(...)`.")
    if config.run.name:
        return config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
