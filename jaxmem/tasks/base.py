"""The task contract: what the trainer, which knows no task by name, asks of each of them.

A `TaskConfig` is the part of a run's config that names the task. It opens a `Task`, which gives
batches, the loss over them, and what is left behind when the run ends. The trainer does the rest:
micro-batches, devices, checkpoints, rows of metrics, plots.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.backbones.base import ModelConfig
from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError
from jaxmem.registry import Registry

Batch = Mapping[str, Any]
"""Arrays by name, each with one row per sequence as its leading axis."""

SPLITS = ("train", "validation")
"""What every task can be asked for batches of."""

LOSS_PREFIX = "loss_"
"""Entries of `TaskLoss.aux` whose names start so are added to the training loss."""


class TaskLoss(NamedTuple):
    """Sums over the scored items of one (micro-)batch, so that parts add up exactly."""

    total: Float[Array, ""]
    """Sum of the losses, float32 or wider."""
    count: Int[Array, ""]
    """Number of scored items (tokens, or what `Task.unit` names), int32."""
    aux: dict[str, Float[Array, ""]]
    """Means over the scored items: `loss_*` are training losses, the rest are metrics, written as
    `aux/NAME` over the training batches and as `val_NAME` and `eval_train_NAME` at evaluations."""


class Batches(Protocol):
    """An endless iterator of batches that knows its position."""

    def __next__(self) -> dict[str, np.ndarray]:
        """Return the next batch; there is always one."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class CountedBatches:
    """Batches that are a function of their number, as synthetic data can be."""

    def __init__(
        self,
        make: Callable[[int], Mapping[str, np.ndarray]],
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Begin at batch 0.

        Args:
          make: returns all rows of batch k. Of these, process p of P takes rows p, p + P, ...
          process_index: p.
          process_count: P.
        """
        self._make = make
        self._share = slice(process_index, None, process_count)
        self._next = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """Return this process's rows of the next batch."""
        batch = self._make(self._next)
        self._next += 1
        return {name: rows[self._share] for name, rows in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a batch."""
        self._next = int(state["next"])


class RunInfo(Protocol):
    """What a task may know of the run whose products it makes."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        ...

    @property
    def samples(self) -> int:
        """Samples wanted at the end, by tasks that can generate."""
        ...

    @property
    def sample_tokens(self) -> int:
        """Tokens per sample."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """Base of all task configs."""

    products: ClassVar[tuple[str, ...]] = ()
    """Files, relative to the run's folder, that `Task.finish` writes; PNGs are shown in run.md."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Raise ConfigError if the task, the model and the data do not fit together.

        Called whenever a run's config is built. The base class takes no text: of `data` it allows
        `batch_size` only.
        """
        given = [
            f"`data.{field.name}={getattr(data, field.name)}`"
            for field in dataclasses.fields(data)
            if field.name != "batch_size" and getattr(data, field.name) != field.default
        ]
        if given:
            raise ConfigError(
                f"The task {task_name(type(self))!r} makes its own data and does not use "
                f"{', '.join(given)}. Leave it out; of `data`, only `data.batch_size` counts."
            )

    @abstractmethod
    def open(self, model: ModelConfig, data: DataConfig) -> "Task":
        """Make the data ready.

        Raises:
          DataError: they are missing, damaged or too small.
          ConfigError: they do not fit the model.
        """

    def restore(self, model: ModelConfig, data: DataConfig, folder: Path) -> "Task":
        """Open the task of a saved run, whose data may be gone: only its model must be buildable.

        Raises:
          DataError: one of `Task.files` is missing from the folder or damaged.
        """
        del folder
        return self.open(model, data)


class Task(ABC):
    """An opened task."""

    unit: ClassVar[str] = "tokens"
    """What `TaskLoss.count` counts."""
    loss_label: ClassVar[str] = "loss (nats per token)"
    """Label of the loss in plots."""
    changed: ClassVar[str] = "this version's generator gives other examples"
    """What has happened if the data are not those of the checkpoint."""
    tokenizer: Any = None
    """Turns text into tokens; None if the task reads no text but its own."""

    def __init__(self, model: ModelConfig):
        """Take the model config, completed by what the data ask for (the vocabulary)."""
        self.model = model

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data: a run resumes only on those that it was begun with."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Describe the data for the head of the log: `data       ...`, texts from column 12 on."""

    @abstractmethod
    def batches(
        self, split: str, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> Batches:
        """Iterate for ever over this process's share of every batch.

        Batch k is a function of (task, split, batch_size, seed, k).

        Args:
          split: one of `SPLITS`.
          batch_size: rows per batch, all processes together.
          seed: another seed gives other batches.
          process_index: 0 to process_count - 1.
          process_count: divides batch_size.

        Raises:
          DataError: the split is too small.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch, *, rngs: nnx.Rngs | None = None) -> TaskLoss:
        """Run the model over a (micro-)batch and sum its loss; pure, and traced under jit.

        Args:
          model: what the completed model config builds.
          batch: as from `batches`.
          rngs: streams for dropout; None means evaluation.
        """

    def files(self) -> dict[str, str]:
        """Return small files by name that the run's folder must hold for `TaskConfig.restore`."""
        return {}

    def check_files(self, folder: Path) -> None:
        """Check the `files` of a run that has begun; the base class has none.

        Raises:
          CheckpointMismatch: they do not belong to the data opened now.
        """
        del folder

    def finish(self, model: Any, run: RunInfo, key: jax.Array) -> list[str]:
        """Write `TaskConfig.products` into the folder of a run that has ended.

        Called on the first process only. What is written depends on the arguments alone. Heavy
        imports (plots) belong inside.

        Args:
          model: with the final parameters, on the host.
          run: its folder, and how many samples are wanted.
          key: for anything random.

        Returns:
          Texts worth showing; the first one is printed to whoever watches.
        """
        del model, run, key
        return []


_TASKS: Registry[TaskConfig] = Registry("task", "jaxmem.tasks")
register_task = _TASKS.register
task_names = _TASKS.names
task_class = _TASKS.config_class
task_name = _TASKS.name_of
