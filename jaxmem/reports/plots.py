"""Figures of a run, as PNG files; no display is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.tasks.base import Task


def loss_plot(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    label: str = Task.loss_label,
    unit: str = Task.unit,
) -> None:
    """Draw training and validation loss against updates, with the items seen as a second axis.

    Args:
      rows: of metrics.jsonl.
      path: of the PNG; its folder is made.
      title: shown above the axes.
      label: of the loss.
      unit: what the task counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    curves = {
        "train_loss": {"label": "training", "color": "0.65", "linewidth": 1},
        "eval_train_loss": {"label": "training, evaluated", "color": "C0", "marker": "o"},
        "val_loss": {"label": "validation", "color": "C1", "marker": "o"},
    }
    for name, style in curves.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), markersize=4, **style)
    axes.set(xlabel="updates", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    rates = [row["tokens"] / row["step"] for row in rows if row.get("step") and "tokens" in row]
    if rates:
        # Every update scores the same number of items up to padding, so the axes are proportional.
        rate = rates[-1]
        tokens = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        tokens.set_xlabel(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
