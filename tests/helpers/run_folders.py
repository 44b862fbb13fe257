"""Run folders that look trained, for tests of what reads them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import configs
from jaxmem.reports.products import files
from jaxmem.training.config import RunConfig, to_json

ENVIRONMENT = {"devices": "1 x cpu", "jax": "1.2.3", "git_revision": "abc"}


def run_config(folder: Path, *, steps: int = 20, seed: int = 0) -> RunConfig:
    """The run of a preset in a folder."""
    preset = configs.load("gpt_tiny")
    run = dataclasses.replace(preset.run, dir=str(folder), steps=steps, seed=seed)
    return dataclasses.replace(preset, run=run)


def write_run(config: RunConfig, losses: dict[int, float], **last: Any) -> Path:
    """Write the folder of a finished run.

    Args:
      config: names the folder.
      losses: validation loss by update.
      last: more fields of the last row.
    """
    folder = config.run.folder
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, "tokens": 10 * step, "val_loss": loss, "seconds": step / 10}
        | ({"train_loss": loss + 0.1, "tokens_per_s": 100.0} if step else {})
        for step, loss in losses.items()
    ]
    rows[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(to_json(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    for name in files(config.task):
        (folder / name).touch()
    return folder
