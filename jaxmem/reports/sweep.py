"""The results of a sweep: a row per run, a row per cell, the order beside the published one."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxmem.reports.runs import read_environment, read_metrics
from jaxmem.reports.sweep_stats import (
    OVERLAP,
    Estimate,
    Verdict,
    estimate,
    our_order,
    published_order,
    verdicts,
)
from jaxmem.reports.sweep_suite import Cell, Suite
from jaxmem.reports.tables import markdown_table
from jaxmem.training.console import duration
from jaxmem.training.disk import disk_errors, write_atomically

FIGURE = "results.png"


class Outcome(NamedTuple):
    """One run, as a row of results.csv."""

    label: str
    preset: str
    overrides: str
    seed: int
    status: Literal["finished", "failed", "open"]
    """`open`: not begun, or stopped before its end."""
    value: float | None
    """Of the suite's metric after the last update."""
    step: int | None
    """Updates of the last row of metrics."""
    tokens: int | None
    """Scored tokens, or what the task counts."""
    seconds: float | None
    """Wall time of training, all starts together."""
    machine: str
    revision: str
    """Of the source, where git knows it."""
    folder: Path
    command: str
    """Trains the run, or goes on with it."""
    error: str
    """In one line, empty unless the run failed."""


def read_outcome(
    cell: Cell,
    seed: int,
    *,
    metric: str,
    steps: int,
    folder: Path,
    command: str,
    finished: bool,
    error: str,
) -> Outcome:
    """Read what a run has left in its folder.

    Args:
      cell: of the suite.
      seed: of the run.
      metric: field of metrics.jsonl.
      steps: updates that the suite asks for.
      folder: of the run; it need not be there.
      command: trains the run.
      finished: whether the folder holds the run with its last update.
      error: why it failed, if it did.

    Returns:
      The row. A finished run that went on, or has no finite number of that name, counts as failed.
    """
    rows = read_metrics(folder)
    last = rows[-1] if rows else {}
    value = last.get(metric) if finished else None
    if finished and not error:
        error = _no_number(metric, steps, last)
    environment = read_environment(folder)
    machine = ", jax ".join(str(environment[key]) for key in ("devices", "jax") if environment)
    return Outcome(
        label=cell.label,
        preset=cell.preset,
        overrides=cell.overrides,
        seed=seed,
        status="failed" if error else "finished" if finished else "open",
        value=None if error else value,
        step=last.get("step"),
        tokens=last.get("tokens"),
        seconds=last.get("seconds"),
        machine=machine,
        revision=environment.get("git_revision") or "",
        folder=folder,
        command=command,
        error=error,
    )


def _no_number(metric: str, steps: int, row: Mapping[str, Any]) -> str:
    """Say why the last row of metrics is no result; empty if it is."""
    if row["step"] != steps:
        return (
            f"the folder holds a run of {row['step']} updates, the suite asks for {steps}: choose "
            "another --out"
        )
    value = row.get(metric)
    if value is None:
        return f"no {metric!r} after the last update; there are {', '.join(row)}"
    return "" if math.isfinite(value) else f"{metric} is {value} after the last update"


def write_results(folder: Path, suite: Suite, outcomes: Sequence[Outcome], command: str) -> None:
    """Write results.csv, results.md and results.png.

    Raises:
      JaxmemError: the disk is full, or the folder cannot be written.
    """
    estimates = _estimates(suite, outcomes)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "results.csv", csv_text(outcomes))
        _plot(suite, outcomes, estimates, folder / FIGURE)
        write_atomically(folder / "results.md", markdown(suite, outcomes, command))


def csv_text(rows: Sequence[NamedTuple]) -> str:
    """Return named tuples of one kind as CSV with a head; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    return text.getvalue()


def markdown(suite: Suite, outcomes: Sequence[Outcome], command: str) -> str:
    """Return results.md: the cells, the failures, the published order, and every run."""
    parts = [f"```\n{command}\n```", _about(suite), _table(suite, outcomes, whole=True)]
    parts += _failures(outcomes)
    if comparison := compare(suite, outcomes):
        parts += ["## Beside the published numbers", comparison]
    parts += [f"![mean and interval per cell]({FIGURE})", "## Runs", _runs(suite, outcomes)]
    return "\n\n".join(parts) + "\n"


def summary(suite: Suite, outcomes: Sequence[Outcome]) -> str:
    """Return what a terminal shows: the cells without machines and commands, and the order."""
    failed = [
        f"failed: {one.label}, seed {one.seed}: {one.error}"
        for one in outcomes
        if one.status == "failed"
    ]
    parts = [_table(suite, outcomes, whole=False), "\n".join(failed), compare(suite, outcomes)]
    return "\n\n".join(part for part in parts if part)


def compare(suite: Suite, outcomes: Sequence[Outcome]) -> str:
    """Say how our order of the cells agrees with the published one; empty if there is none."""
    estimates = _estimates(suite, outcomes)
    found = verdicts(suite, estimates)
    if not found:
        return ""
    counts = [
        f"{sum(one.verdict == name for one in found)} {name}"
        for name in ("agree", "disagree", "undecided")
    ]
    lines = [f"- of {len(found)} published orders of two cells: {', '.join(counts)}"]
    if any(cell.published is not None for cell in suite.cells):
        lines.insert(0, f"- ours, best first: {our_order(suite, estimates)}")
        lines.insert(0, f"- paper, best first: {published_order(suite)}")
    lines += [
        f"- {name}: {'; '.join(pairs)}"
        for name, pairs in (
            ("the other way round here", _pairs(found, "disagree")),
            (f"undecided, {OVERLAP}", _pairs(found, "undecided", OVERLAP)),
        )
        if pairs
    ]
    return "\n".join(lines)


def _pairs(found: Sequence[Verdict], verdict: str, reason: str = "") -> list[str]:
    return [
        f"{one.better} before {one.worse}"
        for one in found
        if (one.verdict, one.reason) == (verdict, reason)
    ]


def _about(suite: Suite) -> str:
    return (
        f"`{suite.metric}` after the last update; {suite.direction} is better. Mean over seeds, "
        "with its 95 % confidence interval (Student's t; a single seed has none). Wall time: mean "
        "of a run."
    )


def _estimates(suite: Suite, outcomes: Sequence[Outcome]) -> dict[str, Estimate | None]:
    return {cell.label: estimate(_values(cell, outcomes)) for cell in suite.cells}


def _values(cell: Cell, outcomes: Sequence[Outcome]) -> list[float]:
    return [one.value for one in outcomes if one.label == cell.label and one.value is not None]


def _table(suite: Suite, outcomes: Sequence[Outcome], *, whole: bool) -> str:
    """Return a row per cell; the whole table also has the machine and the command."""
    estimates = _estimates(suite, outcomes)
    compared = any(cell.published is not None for cell in suite.cells)
    head = ["cell", suite.metric, "95 % interval", *["published"] * compared, "seeds", "wall time"]
    rows = []
    for cell in suite.cells:
        runs = [one for one in outcomes if one.label == cell.label]
        row = [cell.label, *_numbers(estimates[cell.label])]
        if compared:
            row.append("" if cell.published is None else f"{cell.published:.6g}")
        row += [_seeds(runs), _time(runs)]
        if whole:
            row += ["; ".join(dict.fromkeys(one.machine for one in runs if one.machine))]
            row += [f"`{_command(cell)}`"]
        rows.append(row)
    return markdown_table([*head, "machine", "command"] if whole else head, rows)


def _numbers(found: Estimate | None) -> list[str]:
    if found is None:
        return ["", ""]
    interval = "" if found.interval is None else "{:.4f} to {:.4f}".format(*found.interval)
    return [f"{found.mean:.4f}", interval]


def _seeds(runs: Sequence[Outcome]) -> str:
    finished = sum(one.status == "finished" for one in runs)
    failed = sum(one.status == "failed" for one in runs)
    return f"{finished} of {len(runs)}" + (f", {failed} failed" if failed else "")


def _time(runs: Sequence[Outcome]) -> str:
    times = [one.seconds for one in runs if one.status == "finished" and one.seconds is not None]
    return duration(sum(times) / len(times)) if times else ""


def _command(cell: Cell) -> str:
    return f"python -m experiments.train --config {cell.preset} {cell.overrides}".rstrip()


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    failed = [one for one in outcomes if one.status == "failed"]
    if not failed:
        return []
    rows = [(one.label, one.seed, one.error, f"`{one.command}`") for one in failed]
    return ["## Failures", markdown_table(("cell", "seed", "error", "command"), rows)]


def _runs(suite: Suite, outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            one.label,
            one.seed,
            one.status,
            "" if one.value is None else f"{one.value:.4f}",
            "" if one.step is None else f"{one.step:,}",
            "" if one.seconds is None else duration(one.seconds),
            f"`{one.folder}`",
        )
        for one in outcomes
    ]
    head = ("cell", "seed", "status", suite.metric, "updates", "wall time", "folder")
    return markdown_table(head, rows)


def _plot(
    suite: Suite,
    outcomes: Sequence[Outcome],
    estimates: Mapping[str, Estimate | None],
    path: Path,
) -> None:
    """Draw mean, interval and seeds of every cell, and beside them what was published."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [cell.label for cell in suite.cells]
    published = {cell.label: cell.published for cell in suite.cells if cell.published is not None}
    panels = 2 if published else 1
    size = (2.0 + 4.5 * panels, 1.4 + 0.4 * len(labels))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for place, cell in enumerate(suite.cells):
        values = _values(cell, outcomes)
        axes[0].plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        if (found := estimates[cell.label]) is not None:
            margin = found.margin or 0.0  # one seed: a point without whiskers
            axes[0].errorbar(found.mean, place, xerr=margin, fmt="s", color="C0", capsize=4)
    axes[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    axes[0].set_xlabel(f"{suite.metric} ({suite.direction} is better)")
    axes[0].set_title("seeds, their mean, its 95 % interval")
    if published:
        axes[1].plot([*published.values()], [labels.index(p) for p in published], "D", color="C1")
        axes[1].set(xlabel=suite.metric, title="published")
    for panel in axes:
        panel.grid(alpha=0.3)
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
