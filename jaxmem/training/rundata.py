"""The task of a run: opened, and its data found large enough, before anything is written."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxmem.tasks.base import Batches, Task
from jaxmem.training.config import RunConfig
from jaxmem.training.feed import EvalSet, Feed, Place
from jaxmem.training.model import Model
from jaxmem.training.state import stream_seed

EVALUATED = {"eval_train": "train", "val": "validation"}
"""Evaluated splits by what their fields in the metrics begin with."""


@dataclass(frozen=True)
class RunData:
    """An open task, the batches drawn from it, and the model that it asks for."""

    task: Task
    model: Model
    feed: Feed
    """Training batches; the first one was read."""
    eval_sets: dict[str, EvalSet]
    """Evaluation batches by what their fields in the metrics begin with."""


def open_data(config: RunConfig, mesh: Mesh) -> RunData:
    """Open the task of a run.

    Raises:
      DataError: its data are missing, damaged or too small.
      ConfigError: they do not fit the config.
    """
    task = config.task.open(config.model, config.data)
    model = Model.of(config, task)
    place = Place(mesh)
    feed = Feed(run_batches(config, task, "train", "data"), place)
    feed.peek()
    eval_sets = {
        name: EvalSet(run_batches(config, task, split, "eval"), config.run.eval_batches, place)
        for name, split in EVALUATED.items()
    }
    return RunData(task, model, feed, eval_sets)


def run_batches(config: RunConfig, task: Task, split: str, stream: str) -> Batches:
    """Return this process's iterator of batches; evaluation uses those of one micro-batch."""
    parts = 1 if stream == "data" else config.optim.accumulate
    return task.batches(
        split,
        batch_size=config.data.batch_size // parts,
        seed=stream_seed(config.run.seed, stream),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
