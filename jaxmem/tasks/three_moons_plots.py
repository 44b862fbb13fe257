"""Pictures of a memory of three moons: errors by context, attention, and its matrices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.three_moons import ThreeMoons
from jaxmem.data.three_moons import Periods, system_period


class Errors(NamedTuple):
    """Mean absolute errors of a memory on one system."""

    periods: Periods
    regions: tuple[float, ...]
    """Of the next step, by region of time; NaN where the window does not reach."""
    contexts: tuple[int, ...]
    """Context lengths in steps."""
    generated: tuple[float, ...]
    """Of the steps generated from each context."""


def error_plot(runs: Mapping[str, Sequence[Mapping[str, Errors]]], step: float, path: Path) -> None:
    """Draw the error of generated steps against the context, one panel per system.

    Args:
      runs: by label, one or several runs with their errors by system; the mean is drawn, and the
        range if there are several.
      step: time between two steps.
      path: of the PNG.
    """
    systems = next(iter(runs.values()))[0]
    figure, panels = _figure((5.5 * len(systems), 3.8), 1, len(systems), sharey=True)
    for axes, (name, errors) in zip(panels[0], systems.items(), strict=True):
        for label, members in runs.items():
            curves = np.array([member[name].generated for member in members])
            (line,) = axes.plot(errors.contexts, curves.mean(axis=0), label=label)
            if len(members) > 1:
                low, high = curves.min(axis=0), curves.max(axis=0)
                axes.fill_between(
                    errors.contexts, low, high, alpha=0.2, color=line.get_color(), linewidth=0
                )
        marks = {"slowest moon": (max(errors.periods), ":"), "whole system": (None, "--")}
        for label, (time, style) in marks.items():
            time = system_period(errors.periods) if time is None else time
            axes.axvline(time / step, color="0.3", linestyle=style, linewidth=1, label=label)
        axes.set(title=f"{name} system, periods {_listed(errors.periods)}")
        axes.set(xlabel="context (steps)", xlim=(0, max(errors.contexts)), yscale="log")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean absolute error of generated steps")
    panels[0][-1].legend()
    _save(figure, path)


def attention_plot(model: ThreeMoons, series: Mapping[str, Any], path: Path) -> None:
    """Draw the attention of every head, one row of panels per system.

    Args:
      model: the memory.
      series: one window [1 T 6] by the name of its system.
      path: of the PNG.
    """
    heads = model.config.num_heads
    figure, panels = _figure((3.4 * heads + 0.8, 3.2 * len(series)), len(series), heads)
    for row, (name, x) in zip(panels, series.items(), strict=True):
        weights = np.asarray(model.attention_weights(jnp.asarray(x)))[0]
        for head, axes in enumerate(row):
            # The square root shows the weak weights of a memory that averages over many pairs.
            image = axes.imshow(np.sqrt(weights[head]), cmap="magma", vmin=0, vmax=1)
            axes.set(title=f"{name}, head {head + 1}", xlabel="pair read (step)")
        row[0].set_ylabel("reading step")
    figure.colorbar(image, ax=panels.ravel().tolist(), label="square root of the weight")
    _save(figure, path)


def weight_plot(model: ThreeMoons, path: Path) -> None:
    """Draw the magnitude of every 2 x 2 block of all matrices: who reads which moon.

    Args:
      model: the memory.
      path: of the PNG.
    """
    inner = "head" if model.config.head_dim == 2 else "pair"
    moon = inner if model.embedding is not None else "moon"
    matrices = {
        "embedding": (model.embedding, "moon", inner),
        "W_k": (model.key, moon, inner),
        "W_v": (model.value, moon, inner),
        "W_o": (model.output, inner, "moon"),
    }
    shown = {name: entry for name, entry in matrices.items() if entry[0] is not None}
    figure, panels = _figure((3.2 * len(shown), 3.2), 1, len(shown))
    for axes, (name, (layer, source, target)) in zip(panels[0], shown.items(), strict=True):
        values = block_magnitudes(layer.matrix())
        axes.imshow(values, cmap="viridis", vmin=0)
        for (row, column), value in np.ndenumerate(values):
            ink = "w" if value < 0.6 * values.max() else "k"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set(title=f"{name}, {source} to {target}", xlabel=target, ylabel=source)
        for axis, size in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            axis.set_ticks(range(size), [str(number + 1) for number in range(size)])
    _save(figure, path)


def block_magnitudes(matrix: Any) -> np.ndarray:
    """Return sqrt(sum of squares / 2) of every 2 x 2 block of an [I O] matrix.

    For a complex block this is the factor by which it stretches. Odd sizes are filled up with 0.
    """
    weight = np.asarray(matrix)
    weight = np.pad(weight, [(0, size % 2) for size in weight.shape])
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 2, 2, columns // 2, 2)
    return np.sqrt((blocks**2).sum(axis=(1, 3)) / 2)


def _listed(periods: Periods) -> str:
    return ", ".join(f"{period:g}" for period in periods)


def _figure(size: tuple[float, float], rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
