"""Train two presets with three seeds each and compare their validation losses.

Runs that are finished are not repeated. Writes a Markdown table and a figure.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from jaxmem.reports.runs import read_metrics

SEEDS = (1337, 1338, 1339)
Curve = dict[int, float]


class Curves(NamedTuple):
    """Validation losses of one preset, by update, one curve per seed."""

    config: str
    runs: list[Curve]


def main() -> None:
    """Run what is missing, then print the table and write it beside the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs=2, default=["mm_small", "gpt_small"])
    parser.add_argument("--path", help="text to train on; the default corpus without it")
    parser.add_argument("--runs", type=Path, default=Path("runs/three_seeds"))
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .png")
    args = parser.parse_args()
    curves = []
    for config in args.configs:
        runs = [train(config, seed, args.runs, args.path) for seed in SEEDS]
        curves.append(Curves(config, runs))
    text = table(curves)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(curves, args.out.with_suffix(".png"))


def train(config: str, seed: int, runs: Path, path: str | None) -> Curve:
    """Train one preset with one seed, unless that is done; return its validation losses."""
    folder = runs / f"{config}_{seed}"
    command = [sys.executable, "-m", "experiments.train", "--config", config]
    command += ["--run.dir", str(folder), "--run.seed", str(seed)]
    command += ["--data.path", path] if path else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = read_metrics(folder)
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def table(curves: list[Curves]) -> str:
    """Format mean ± standard deviation over seeds at every evaluation."""
    header = ["update", *(c.config for c in curves), "every seed below"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for step in curves[0].runs[0]:
        values = [[run[step] for run in c.runs] for c in curves]
        cells = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in values]
        below = "yes" if max(values[0]) < min(values[1]) else "no"
        lines.append("| " + " | ".join([str(step), *cells, below]) + " |")
    return "\n".join(lines)


def plot(curves: list[Curves], path: Path) -> None:
    """Draw the mean of each preset, and the range over its seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=130)
    for c in curves:
        steps = list(c.runs[0])
        columns = [[run[s] for run in c.runs] for s in steps]
        axes.plot(steps, [statistics.mean(v) for v in columns], "o-", markersize=4, label=c.config)
        axes.fill_between(steps, [min(v) for v in columns], [max(v) for v in columns], alpha=0.25)
    axes.set(xlabel="updates", ylabel="validation loss (nats per character)")
    axes.set_ylim(top=3.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
