"""Read the small files of a run folder."""

import json
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *whole, rest = path.read_text("utf-8").split("\n")
    del rest  # what follows the last line end: nothing, or half a row
    return [json.loads(line) for line in whole]


def read_environment(folder: Path) -> dict[str, Any]:
    """Read environment.json; empty if there is none."""
    path = folder / "environment.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
