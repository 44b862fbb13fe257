"""Train three_moons_3heads and three_moons_1head with three seeds each and compare their errors.

Runs that are finished are not repeated. Writes a Markdown table and figures.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.compare import curve, train
from jaxmem.backbones.three_moons import Method
from jaxmem.tasks.three_moons import ThreeMoonsTaskConfig
from jaxmem.tasks.three_moons_plots import Errors, error_plot
from jaxmem.tasks.three_moons_report import (
    AUTHORS,
    DECISIVE,
    ORBIT_LIMIT,
    REGIONS,
    SYSTEMS,
    draw_series,
    generation_errors,
)
from jaxmem.training.model import load_run

SEEDS = (100, 101, 102)
CONFIGS = {"three_moons_3heads": "orbit", "three_moons_1head": "system"}
METHODS: tuple[Method, ...] = ("cached", "released")
TASK = ThreeMoonsTaskConfig()
CONTEXT = 50
"""Context of the second table: the slowest moon has been round, the system has not."""


class Run(NamedTuple):
    """What one run left."""

    seed: int
    folder: Path
    loss: float
    facts: dict[str, Any]

    @property
    def errors(self) -> dict[str, Errors]:
        """Return the errors by system."""
        return {name: Errors(**found) for name, found in self.facts["systems"].items()}


def main() -> None:
    """Run what is missing, then print the tables and write them beside the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/three_moons"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder")
    args = parser.parse_args()
    runs = {config: [result(config, seed, args.runs) for seed in SEEDS] for config in CONFIGS}
    text = "\n\n".join(
        [
            "Made by `python -m benchmarks.three_moons`, with the figures beside this file.",
            region_table(runs),
            verdicts(runs),
            generation_table(runs),
        ]
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "three_moons.md").write_text(text + "\n", encoding="utf-8")
    curves = {config: [run.errors for run in members] for config, members in runs.items()}
    step = runs["three_moons_3heads"][0].facts["time_step"]
    error_plot(curves, step, args.out / "three_moons_error_by_context.png")
    for config, members in runs.items():
        for plot in ("attention", "weights"):
            source = members[0].folder / "plots" / f"{plot}.png"
            shutil.copyfile(source, args.out / f"{config}_{plot}.png")


def result(config: str, seed: int, runs: Path) -> Run:
    """Train one preset with one seed, unless that is done; read what it left."""
    folder = train(config, seed, runs)
    losses = curve(folder, "val_loss")
    facts = json.loads((folder / "three_moons.json").read_text("utf-8"))
    return Run(seed, folder, losses[max(losses)], facts)


def region_table(runs: dict[str, list[Run]]) -> str:
    """Return the errors of the next step by run, system and region."""
    head = ["config", "seed", "validation loss", "system", *REGIONS, "claim holds"]
    lines = [head, ["---"] * len(head)]
    for config, members in runs.items():
        for run in members:
            for name, errors in run.errors.items():
                regions = [f"{value:.3f}" for value in errors.regions]
                holds = "yes" if run.facts["holds"] else "no"
                lines.append([config, str(run.seed), f"{run.loss:.4f}", name, *regions, holds])
    return "Mean absolute error of the next step.\n\n" + _table(lines)


def verdicts(runs: dict[str, list[Run]]) -> str:
    """Return the bands of the decisive region beside the authors' numbers."""
    head = ["config", "system", f"{REGIONS[DECISIVE]}, three seeds", "authors' equations"]
    lines = [head, ["---"] * len(head)]
    for config, members in runs.items():
        for name in SYSTEMS:
            values = [run.errors[name].regions[DECISIVE] for run in members]
            theirs = ", ".join(f"{value:.3f}" for value in AUTHORS[CONFIGS[config]][name])
            lines.append([config, name, f"{min(values):.3f} .. {max(values):.3f}", theirs])
    return f"The check draws its line at {ORBIT_LIMIT}.\n\n" + _table(lines)


def generation_table(runs: dict[str, list[Run]]) -> str:
    """Return the error of generated steps at one context, corrected and as released."""
    head = ["config", "seed", "corrected", "as released"]
    lines = [head, ["---"] * len(head)]
    for config, members in runs.items():
        for run in members:
            model: Any = load_run(run.folder, checkpoint="last").model
            found = [f"{generated(model, method):.3f}" for method in METHODS]
            lines.append([config, str(run.seed), *found])
    title = f"Mean absolute error of {TASK.horizon} steps generated from a context of {CONTEXT}, "
    return f"{title}training system.\n\n" + _table(lines)


def generated(model: Any, method: Method) -> float:
    """Return the error of generation on the training system."""

    def error(x: jax.Array) -> jax.Array:
        return generation_errors(model, x, np.array([CONTEXT]), TASK.horizon, method)

    series = draw_series(model, SYSTEMS["training"], TASK, 0)
    return float(jax.jit(jax.vmap(error))(series).mean())


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
