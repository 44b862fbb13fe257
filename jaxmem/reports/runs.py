"""Read the small files of a run folder."""

import json
import sys
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl.

    A last line cut short by a kill is left out; other lines that are no row are, with a note on
    stderr.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *whole, rest = path.read_text("utf-8", errors="replace").split("\n")
    del rest  # what follows the last line end: nothing, or half a row
    rows = []
    for number, line in enumerate(whole, start=1):
        row = _row(line)
        if row is None:
            print(f"note: {path}, line {number} is no row of metrics; left out", file=sys.stderr)
        else:
            rows.append(row)
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def read_environment(folder: Path) -> dict[str, Any]:
    """Read environment.json; empty if there is none."""
    path = folder / "environment.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
