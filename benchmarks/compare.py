"""Train presets with several seeds each and compare what they reach: a Markdown table and a figure.

    python -m benchmarks.compare mm_small gpt_small --out docs/figures/mm_small
    python -m benchmarks.compare icll_mm icll_gpt --metrics val_accuracy val_tvd --out icll

Flags after `--` go to every run. Runs that are finished are not repeated, and one that was stopped
goes on, so the same command can be given until all is done.
"""

import argparse
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmem.reports.runs import read_metrics
from jaxmem.reports.tables import markdown_table

SEEDS = (1337, 1338, 1339)
Curve = dict[int, float]
"""A metric by update."""


class Curves(NamedTuple):
    """One metric of one preset, one curve per seed."""

    config: str
    metric: str
    runs: list[Curve]

    @property
    def steps(self) -> list[int]:
        """Updates at which every run was evaluated."""
        return sorted(set.intersection(*(set(run) for run in self.runs)))

    def at(self, step: int) -> list[float]:
        """Return the values of all seeds."""
        return [run[step] for run in self.runs]


def main() -> None:
    """Run what is missing, then write the table beside the figure and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="presets to compare")
    parser.add_argument(
        "--metrics", nargs="+", default=["val_loss"], help="fields of metrics.jsonl"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/compare"), help="folder of the runs"
    )
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .png")
    where = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:where]), sys.argv[where + 1 :]
    runs = {
        config: [train(config, seed, args.runs, flags) for seed in args.seeds]
        for config in args.configs
    }
    curves = [
        Curves(config, metric, [curve(folder, metric) for folder in folders])
        for metric in args.metrics
        for config, folders in runs.items()
    ]
    command = shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]])
    text = report(curves, command, len(args.seeds))
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(curves, args.out.with_suffix(".png"))


def train(config: str, seed: int, runs: Path, flags: Sequence[str] = ()) -> Path:
    """Train one preset with one seed, unless that is done; return the folder of the run."""
    folder = runs / f"{Path(config).stem}_{seed}"
    command = [sys.executable, "-m", "experiments.train", "--config", config]
    command += ["--run.dir", str(folder), "--run.seed", str(seed), *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def curve(folder: Path, metric: str) -> Curve:
    """Read one metric of a run."""
    found = {row["step"]: row[metric] for row in read_metrics(folder) if metric in row}
    if not found:
        raise SystemExit(f"{folder} has no {metric!r} in its metrics.jsonl.")
    return found


def report(curves: Sequence[Curves], command: str, seeds: int) -> str:
    """Return the command, and one table per metric: mean ± standard deviation over the seeds."""
    parts = [f"```\n{command}\n```"]
    parts += [f"Mean ± standard deviation over {seeds} seeds."] if seeds > 1 else []
    for metric in dict.fromkeys(c.metric for c in curves):
        parts += [f"## {words(metric)}", table([c for c in curves if c.metric == metric])]
    return "\n\n".join(parts)


def table(curves: Sequence[Curves]) -> str:
    """Return one row per evaluation, one column per preset; of two, say if all seeds agree."""
    first = curves[0]
    steps = [step for step in first.steps if all(step in c.steps for c in curves)]
    verdict = ["every seed of the first is"] if len(curves) == 2 else []
    rows = []
    for step in steps:
        values = [c.at(step) for c in curves]
        cells = [f"{statistics.mean(v):.4f}{deviation(v)}" for v in values]
        rows.append([step, *cells, *([order(*values)] if verdict else [])])
    return markdown_table(["updates", *(c.config for c in curves), *verdict], rows)


def deviation(values: Sequence[float]) -> str:
    """Return ± the standard deviation; nothing for a single seed."""
    return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def order(first: Sequence[float], second: Sequence[float]) -> str:
    """Say on which side of all seeds of the second preset those of the first lie."""
    if max(first) < min(second):
        return "below"
    return "above" if min(first) > max(second) else ""


def words(metric: str) -> str:
    """Write the name of a field as words."""
    kind = {"val": "validation", "eval": "evaluated", "aux": "training"}
    return " ".join(kind.get(part, part) for part in metric.replace("/", "_").split("_"))


def plot(curves: Sequence[Curves], path: Path) -> None:
    """Draw the mean of each preset and the range over its seeds, one panel per metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(c.metric for c in curves))
    columns = min(len(metrics), 3)
    size = (1.6 + 4.8 * columns, 4.0 * math.ceil(len(metrics) / columns))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(math.ceil(len(metrics) / columns), columns, squeeze=False)
    for metric, axes in zip(metrics, panels.flat, strict=False):
        for c in (c for c in curves if c.metric == metric):
            values = [c.at(step) for step in c.steps]
            means = [statistics.mean(v) for v in values]
            axes.plot(c.steps, means, "o-", markersize=4, label=Path(c.config).stem)
            axes.fill_between(
                c.steps, [min(v) for v in values], [max(v) for v in values], alpha=0.25
            )
        axes.set(xlabel="updates", ylabel=words(metric))
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in panels.flat[len(metrics) :]:
        axes.remove()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
