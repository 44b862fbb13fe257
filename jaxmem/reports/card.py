"""The run card, run.md: what was run, where, and what came out, on one page."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmem.reports.tables import markdown_table
from jaxmem.training.config import RunConfig, diff
from jaxmem.training.console import human_bytes
from jaxmem.training.layout import flat_params


def parameter_checksum(model: nnx.Module) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of all parameters, sorted by name."""
    digest = hashlib.sha256()
    _, params = flat_params(model)
    for name, leaf in sorted((".".join(map(str, path)), leaf) for path, leaf in params.items()):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def run_card(
    config: RunConfig,
    preset: RunConfig | None,
    *,
    command: str,
    environment: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    model: nnx.Module,
) -> str:
    """Return the Markdown of the run card.

    Args:
      config: of the run.
      preset: what it was made from, None if that is not known.
      command: the command line that finished the run.
      environment: versions and devices.
      rows: of metrics.jsonl.
      model: with the final parameters.
    """
    changes = [] if preset is None else diff(preset, config)
    difference = "The preset, unchanged."
    if changes:
        cells = [tuple(map(_code, change)) for change in changes]
        difference = markdown_table(("field", "preset", "here"), cells)
    parts = [
        f"# {config.run.name or config.run.folder.name}",
        f"```\n{command}\n```",
        "## Result",
        _result(rows),
        *(f"![{Path(name).stem}]({name})" for name in _pictures(config)),
        _curve(rows),
        f"SHA-256 of the final parameters: `{parameter_checksum(model)}`",
        "## Configuration",
        difference if preset is not None else "All fields stand in config.json.",
        "## Environment",
        markdown_table(("", ""), [(key, _text(value)) for key, value in environment.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _pictures(config: RunConfig) -> list[str]:
    """Return the paths of the pictures in the run's folder."""
    return ["plots/loss.png", *(name for name in config.task.products if name.endswith(".png"))]


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the task's own metrics on the validation split."""
    return [key.removeprefix("val_") for key in row if key[:4] == "val_" and key != "val_loss"]


def _result(rows: Sequence[Mapping[str, Any]]) -> str:
    evaluated = [row for row in rows if row.get("val_loss") is not None]
    if not evaluated:
        return "The run was never evaluated."
    last, best = evaluated[-1], min(evaluated, key=lambda row: row["val_loss"])
    facts = [
        ("updates", f"{last['step']:,}"),
        ("tokens", f"{last['tokens']:,}"),
        ("validation loss", f"{last['val_loss']:.4f}"),
        ("best validation loss", f"{best['val_loss']:.4f} at update {best['step']:,}"),
    ]
    facts += [(f"validation {name}", f"{last[f'val_{name}']:.4f}") for name in _metrics(last)]
    if (loss := last.get("eval_train_loss")) is not None:
        facts.append(("training loss, evaluated", f"{loss:.4f}"))
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    if speeds:
        facts.append(("tokens/s, median", f"{np.median(speeds):,.0f}"))
    if "seconds" in last:
        facts.append(("time", f"{last['seconds']:,.0f} s"))
    if "peak_bytes" in last:
        facts.append(("peak memory", human_bytes(last["peak_bytes"])))
    return markdown_table(("", ""), facts)


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    evaluated = [row for row in rows if row.get("val_loss") is not None]
    metrics = _metrics(evaluated[-1]) if evaluated else []
    table = [
        (
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            _loss(row.get("eval_train_loss")),
            _loss(row["val_loss"]),
            *(_loss(row.get(f"val_{name}")) for name in metrics),
        )
        for row in evaluated
    ]
    named = (f"validation {name}" for name in metrics)
    return markdown_table(("updates", "tokens", "training loss", "validation loss", *named), table)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _code(value: Any) -> str:
    return f"`{value}`"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
