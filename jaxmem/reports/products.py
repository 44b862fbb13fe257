"""What a finished run leaves besides its numbers: plots/loss.png, the task's own files, run.md."""

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxmem.reports.card import run_card
from jaxmem.reports.plots import loss_plot
from jaxmem.reports.runs import read_environment, read_metrics
from jaxmem.tasks.base import Task, TaskConfig
from jaxmem.training.config import RunConfig
from jaxmem.training.disk import disk_errors, write_atomically
from jaxmem.training.state import stream_key


def make_products(
    config: RunConfig,
    preset: RunConfig | None,
    model: nnx.Module,
    task: Task,
    *,
    command: str,
) -> list[str]:
    """Write the plot, what the task leaves, and the run card into the run's folder.

    Call it on every process; the first one writes. What the task leaves depends on `run.seed` and
    the parameters only.

    Args:
      config: of the run.
      preset: what it was made from.
      model: with the final parameters, however they are placed.
      task: of the run.
      command: the command line, for the card.

    Returns:
      Texts worth showing, such as samples; empty on all processes but the first.
    """
    graphdef, params = nnx.split(model)
    # On the host, so that what the task does runs on one device and needs no other process.
    params = jax.tree.map(_to_host, params)
    if jax.process_index():
        return []
    model = nnx.merge(graphdef, params)
    folder = config.run.folder
    rows = read_metrics(folder)
    title = config.run.name or folder.name
    with disk_errors(folder):
        picture = folder / "plots" / "loss.png"
        loss_plot(rows, picture, title=title, label=task.loss_label, unit=task.unit)
        texts = task.finish(model, config.run, stream_key(config.run.seed, "sample"))
    card = run_card(
        config,
        preset,
        command=command,
        environment=read_environment(folder),
        rows=rows,
        model=model,
    )
    write_atomically(folder / "run.md", card)  # the last file: it says that all others are whole
    return texts


def files(task: TaskConfig) -> tuple[str, ...]:
    """Return the names of what `make_products` writes for a run of this task."""
    return ("plots/loss.png", *task.products, "run.md")


def missing_products(config: RunConfig) -> bool:
    """Say whether a kill came between the last update and the files of `make_products`."""
    return not all((config.run.folder / name).is_file() for name in files(config.task))


def _to_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
