"""What ``--list`` shows: presets, mixers and suites, read from source; imports nothing heavy."""

import ast
from pathlib import Path
from typing import NamedTuple

import configs
from configs import suites

_MIXERS = Path(__file__).parent.parent / "jaxmem" / "mixers"


class MixerEntry(NamedTuple):
    """A registered mixer and the first line of its docstring."""

    name: str
    purpose: str


def mixers(folder: Path = _MIXERS) -> list[MixerEntry]:
    """Find the classes decorated with ``@register("name")`` in the files of ``folder``."""
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                purpose = (ast.get_docstring(node) or "").partition("\n")[0]
                found += [
                    MixerEntry(name, purpose)
                    for name in map(_registered, node.decorator_list)
                    if name
                ]
    return sorted(found)


def _registered(decorator: ast.expr) -> str | None:
    if not (isinstance(decorator, ast.Call) and decorator.args):
        return None
    function, first = decorator.func, decorator.args[0]
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called != "register" or not isinstance(first, ast.Constant):
        return None
    return str(first.value)


def listing() -> str:
    """Return the text of ``--list``."""
    presets = [configs.describe(name) for name in configs.names()]
    rows = [(p.name, p.purpose, p.parameters, p.time) for p in presets]
    lines = ["Presets: --config NAME", *_table(("name", "purpose", "parameters", "time"), rows), ""]
    lines += ["Mixers: --mixer NAME", *_table(("name", "purpose"), mixers()), ""]
    swept = [(s.name, s.purpose, s.time) for s in map(suites.describe, suites.names())]
    title = "Suites: python -m experiments.sweep --suite NAME"
    lines += [title, *_table(("name", "purpose", "time"), swept)]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list) -> list[str]:
    cells = [head, *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
