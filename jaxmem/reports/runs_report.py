"""Runs side by side, read from their folders: results, what differs, and the curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem.errors import CheckpointMismatch
from jaxmem.reports.runs import read_environment, read_metrics
from jaxmem.reports.sweep import csv_text
from jaxmem.reports.sweep_stats import estimate
from jaxmem.reports.tables import markdown_table
from jaxmem.training.config import EXEMPT, RunConfig, flatten, to_dict
from jaxmem.training.console import duration
from jaxmem.training.disk import disk_errors, write_atomically
from jaxmem.training.folder import saved_config

FIGURE = "report.png"
_MOST_FIELDS = 40
"""Differing fields that are listed; models of two families differ in all of theirs."""


class Run(NamedTuple):
    """What a run folder holds."""

    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    environment: dict[str, Any]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rows of evaluations."""
        return [row for row in self.rows if row.get("val_loss") is not None]


class Group(NamedTuple):
    """Runs that differ in the seed only, and in what changes no result."""

    label: str
    runs: list[Run]


class Result(NamedTuple):
    """One run, as a row of report.csv; empty where the run has not got so far."""

    run: str
    seed: int
    step: int | None
    """Updates of the last evaluation."""
    steps: int
    """Updates that the run asks for."""
    tokens: int | None
    val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    metrics: str
    """The task's own metrics on the validation split, as JSON."""
    seconds: float | None
    tokens_per_s: float | None
    """Median over the rows of metrics."""
    machine: str
    revision: str
    folder: Path


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
      CheckpointMismatch: it is none, or its config cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointMismatch(f"{folder} is not a run folder: it is no folder.")
    if (folder / "results.csv").is_file() and not (folder / "config.json").exists():
        raise CheckpointMismatch(
            f"{folder} is not a run folder but that of a sweep. Give {folder / 'runs'}/*."
        )
    return Run(folder, saved_config(folder), read_metrics(folder), read_environment(folder))


def write_report(runs: Sequence[Run], out: Path, command: str) -> str:
    """Write report.md, report.csv and report.png into a folder.

    Args:
      runs: in the order of the tables.
      out: the folder; it is made.
      command: the command line, shown in the Markdown.

    Returns:
      The table of results, for the terminal.

    Raises:
      JaxmemError: the disk is full, or the folder cannot be written.
    """
    results = [_result(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    groups = group(runs)
    table = _results(results)
    parts = [f"```\n{command}\n```", "## Results", table]
    if len(groups) > 1:
        parts += ["## What differs", _differences(groups)]
    parts += ["## Validation loss", _curve(groups), f"![curves of the losses]({FIGURE})"]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "report.csv", csv_text(results))
        _plot(groups, out / FIGURE)
        write_atomically(out / "report.md", "\n\n".join(parts) + "\n")
    return table


def group(runs: Sequence[Run]) -> list[Group]:
    """Put runs of one configuration with several seeds together, in the order of the first ones.

    A run that repeats a seed stays out: the same result twice would narrow the interval. A group is
    called after its first run, without the seed; after its folder if that is not unique.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_matters(run.config), sort_keys=True)
        while run.config.run.seed in {other.config.run.seed for other in found.get(key, ())}:
            key += "again"
        found.setdefault(key, []).append(run)
    labels = [_label(members) for members in found.values()]
    return [
        Group(label if labels.count(label) == 1 else str(members[0].folder), members)
        for label, members in zip(labels, found.values(), strict=True)
    ]


def _matters(config: RunConfig) -> dict[str, Any]:
    """Return the fields that two seeds of one experiment share."""
    free = (EXEMPT - {"run.steps"}) | {"run.seed"}
    return {path: value for path, value in flatten(to_dict(config)).items() if path not in free}


def _label(members: Sequence[Run]) -> str:
    name = members[0].folder.resolve().name
    return name.removesuffix(f"_{members[0].config.run.seed}") if len(members) > 1 else name


def _names(runs: Sequence[Run]) -> list[str]:
    """Name runs after their folders, by the whole path where two folders are called the same."""
    names = [run.folder.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder)
        for name, run in zip(names, runs, strict=True)
    ]


def _result(run: Run, name: str) -> Result:
    last = run.evaluated[-1] if run.evaluated else {}
    best = min(run.evaluated, key=lambda row: row["val_loss"], default={})
    speeds = [row["tokens_per_s"] for row in run.rows if "tokens_per_s" in row]
    own = {key: last[key] for key in last if key.startswith("val_") and key != "val_loss"}
    machine = [str(run.environment[key]) for key in ("devices", "jax") if key in run.environment]
    return Result(
        run=name,
        seed=run.config.run.seed,
        step=last.get("step"),
        steps=run.config.run.steps,
        tokens=last.get("tokens"),
        val_loss=last.get("val_loss"),
        best_val_loss=best.get("val_loss"),
        best_step=best.get("step"),
        metrics=json.dumps(own) if own else "",
        seconds=last.get("seconds"),
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        machine=", jax ".join(machine),
        revision=run.environment.get("git_revision") or "",
        folder=run.folder,
    )


def _results(results: Sequence[Result]) -> str:
    own = [json.loads(one.metrics) if one.metrics else {} for one in results]
    names = list(dict.fromkeys(name for metrics in own for name in metrics))
    head = ["run", "seed", "updates", "tokens", "validation loss", "best", "at update"]
    head += [f"validation {name.removeprefix('val_')}" for name in names]
    head += ["time", "tokens/s", "machine"]
    rows = [
        [
            one.run,
            one.seed,
            _updates(one),
            _number(one.tokens, ",d"),
            _number(one.val_loss),
            _number(one.best_val_loss),
            _number(one.best_step, ",d"),
            *(_number(metrics.get(name)) for name in names),
            "" if one.seconds is None else duration(one.seconds),
            _number(one.tokens_per_s, ",.0f"),
            one.machine,
        ]
        for one, metrics in zip(results, own, strict=True)
    ]
    return markdown_table(head, rows)


def _updates(one: Result) -> str:
    """Say how far the run is; of how many if it is not at its end."""
    done = one.step or 0
    return f"{done:,}" if done >= one.steps else f"{done:,} of {one.steps:,}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _differences(groups: Sequence[Group]) -> str:
    fields = [_matters(one.runs[0].config) for one in groups]
    paths = list(dict.fromkeys(path for tree in fields for path in tree))
    differ = [path for path in paths if len({repr(tree.get(path)) for tree in fields}) > 1]
    rows = [
        (f"`{path}`", *(f"`{tree[path]}`" if path in tree else "" for tree in fields))
        for path in differ[:_MOST_FIELDS]
    ]
    table = markdown_table(("field", *(one.label for one in groups)), rows)
    more = len(differ) - _MOST_FIELDS
    return table + (f"\n\n{more} further fields differ." if more > 0 else "")


def _curve(groups: Sequence[Group]) -> str:
    """Return the mean per group at every update that one of its runs was evaluated at."""
    curves = [_means(one) for one in groups]
    steps = sorted({step for curve in curves for step in curve})
    rows = [(f"{step:,}", *(curve.get(step, "") for curve in curves)) for step in steps]
    table = markdown_table(("updates", *map(_title, groups)), rows)
    if not any(len(one.runs) > 1 for one in groups):
        return table
    return "Mean over seeds ± half of its 95 % confidence interval (Student's t).\n\n" + table


def _title(one: Group) -> str:
    return f"{one.label}, {len(one.runs)} seeds" if len(one.runs) > 1 else one.label


def _means(one: Group) -> Mapping[int, str]:
    curves = [{row["step"]: row["val_loss"] for row in run.evaluated} for run in one.runs]
    # A mean over some of the seeds would jump where the others end.
    shared = set.intersection(*(set(curve) for curve in curves))
    means = {}
    for step in shared:
        found = estimate([curve[step] for curve in curves])
        if found is not None:
            margin = "" if found.margin is None else f" ± {found.margin:.4f}"
            means[step] = f"{found.mean:.4f}{margin}"
    return means


def _plot(groups: Sequence[Group], path: Path) -> None:
    """Draw the curves of all runs, one colour per group: training pale, validation with dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(groups):
        colour, label = f"C{number % 10}", one.label
        for run in one.runs:
            trained = [(r["step"], r["train_loss"]) for r in run.rows if "train_loss" in r]
            if trained:
                axes.plot(*zip(*trained, strict=True), color=colour, alpha=0.3, linewidth=1)
            if run.evaluated:
                points = [(row["step"], row["val_loss"]) for row in run.evaluated]
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
                label = None  # one entry per group
    axes.set(xlabel="updates", ylabel="loss", title="validation loss (dots) and training loss")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
