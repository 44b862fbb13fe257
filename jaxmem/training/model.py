"""The model of a run: from its config, and from a finished run's folder."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxmem.backbones.base import ModelConfig
from jaxmem.errors import CheckpointMismatch, ConfigError
from jaxmem.tasks.base import Batch, Task, task_name
from jaxmem.training.checkpoint import Checkpoints, UnreadableCheckpoint
from jaxmem.training.config import RunConfig
from jaxmem.training.folder import saved_config
from jaxmem.training.layout import ModelParts, Params, take_apart

PRECISIONS = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}
"""Type of activations by the name of the policy; parameters are float32 in both."""


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a run's model, and the model taken apart."""

    config: ModelConfig
    """Complete: the task has filled in what its data decide."""
    compute_dtype: jnp.dtype
    parts: ModelParts = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", take_apart(self.make))

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> "Model":
        """Describe the model of a run whose task is open."""
        return cls(task.model, PRECISIONS[config.run.precision])

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Build the model with fresh parameters."""
        return self.config.build(rngs, self.compute_dtype)


class LoadedRun(NamedTuple):
    """A trained model and what belongs to it."""

    config: RunConfig
    model: Any
    task: Task
    step: int
    """Updates that the parameters have seen."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the run's text.

        Raises:
          ConfigError: the run's task makes its own data.
        """
        if self.task.tokenizer is None:
            raise ConfigError(
                f"The run's task, {task_name(type(self.config.task))}, makes its own data and has "
                "no tokenizer for other texts. Choose a run of language_modeling."
            )
        return self.task.tokenizer


def load_run(folder: Path, *, checkpoint: Literal["best", "last"] | int = "best") -> LoadedRun:
    """Load a run's model from its folder, onto one device.

    Args:
      folder: of the run.
      checkpoint: the one with the best validation loss, the last one, or that of a step. If the
        best or the last one is damaged, the newest readable one, with a message on stderr.

    Raises:
      CheckpointMismatch: this is no run folder, it has no such checkpoint, or it cannot be read.
      DataError: what the task keeps in the folder (a tokenizer) is missing or damaged.
    """
    config = saved_config(folder)
    task = config.task.restore(config.model, config.data, folder)
    model = Model.of(config, task)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        step = _choose(checkpoints, folder, checkpoint)
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in model.parts.layout.shapes.items()
        }
        others = [] if checkpoint == step else [s for s in checkpoints.steps() if s != step]
        step, single = _first_readable(checkpoints, [step, *reversed(others)], targets)
    finally:
        checkpoints.release()
    return LoadedRun(config, model.parts.merge_single(single), task, step)


def _choose(checkpoints: Checkpoints, folder: Path, which: Literal["best", "last"] | int) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointMismatch(f"{folder} holds no checkpoint yet. Train the run first.")
    if which == "last":
        return steps[-1]
    if which == "best":
        best = checkpoints.best_step()
        return steps[-1] if best is None else best
    if which not in steps:
        known = ", ".join(map(str, steps))
        raise CheckpointMismatch(f"{folder} has no checkpoint of step {which}; it has {known}.")
    return which


def _first_readable(
    checkpoints: Checkpoints, steps: Sequence[int], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[int, Params]:
    """Read the parameters of the first of these checkpoints that is not damaged."""
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        try:
            return step, checkpoints.restore_params(step, targets)
        except UnreadableCheckpoint as err:
            if following is None:
                if len(steps) == 1:
                    raise
                raise CheckpointMismatch(f"None of the checkpoints can be read. {err}") from err
            print(f"{err} Trying that of step {following}.", file=sys.stderr)
    raise AssertionError("there is at least one checkpoint")


def evaluate_batches(task: Task, model: nnx.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the means of the loss (as `loss`) and of the task's metrics over all batches.

    Every scored item counts alike, whatever batch it is in; `count` is their number.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def sums(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = task.loss(nnx.merge(graphdef, params), batch)
        return out.count, {"loss": out.total} | {n: x * out.count for n, x in out.aux.items()}

    found = [jax.device_get(sums(params, dict(batch))) for batch in batches]
    count = sum(int(number) for number, _ in found)
    names = found[0][1] if found else {}
    means = {n: sum(float(total[n]) for _, total in found) / max(count, 1) for n in names}
    return means | {"count": count}
