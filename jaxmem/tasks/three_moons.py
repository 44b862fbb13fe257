"""Continue three moons: predict each next position; the loss is the clipped squared error."""

import dataclasses
import hashlib
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.backbones.base import ModelConfig
from jaxmem.backbones.three_moons import ThreeMoonsConfig
from jaxmem.data.config import DataConfig
from jaxmem.data.three_moons import (
    FEATURES,
    GRID,
    PHASE,
    SPLITS,
    Observer,
    draw,
    draw_starts,
    time_step,
    windows,
)
from jaxmem.errors import ConfigError
from jaxmem.ops.norms import at_least_float32
from jaxmem.tasks.base import (
    Batch,
    Batches,
    CountedBatches,
    RunInfo,
    Task,
    TaskConfig,
    TaskLoss,
    register_task,
)

Expectation = Literal["nothing", "orbit", "system"]

CLIP = 0.5
"""Residuals beyond this cost no more, and have no gradient."""
SHORTEST_CONTEXT = 16
"""Windows with fewer steps have none in some of the regions whose errors are reported."""


def clipped_square_sum(
    y: Float[Array, "B T D"], target: Float[Array, "B T D"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum clip(y - target, ±0.5)² over the steps, averaged over the numbers of each.

    Returns:
      The sum (float32 or wider) and the number of steps B T.

    Reference: ThreeMoons, training loss.
    """
    residual = jnp.clip(at_least_float32(y) - at_least_float32(target), -CLIP, CLIP)
    steps = y.shape[0] * y.shape[1]
    return jnp.sum(jnp.mean(residual**2, axis=-1)), jnp.asarray(steps, jnp.int32)


@register_task("three_moons")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeMoonsTaskConfig(TaskConfig):
    """Predict where three moons stand next, and show at the end what the memory has learnt."""

    products: ClassVar[tuple[str, ...]] = (
        "three_moons.json",
        "three_moons.md",
        "plots/error_by_context.png",
        "plots/attention.png",
        "plots/weights.png",
    )

    observer: Observer = "sun"
    """Who looks: the sun, or the planet that is itself the third moon."""
    starts: int = 64
    """Windows per system over which the errors at the end of the run are averaged."""
    horizon: int = 25
    """Steps that are generated from each context at the end of the run."""
    expect: Expectation = "nothing"
    """What is checked at the end: that errors are small after one orbit of the slowest moon, or
    only after the period of the whole system."""

    def __post_init__(self) -> None:
        for name in ("starts", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`task.{name}={getattr(self, name)}` must be 1 or more.")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Ask for a memory that reads the six numbers, and for no text."""
        super().check(model, data)
        if not isinstance(model, ThreeMoonsConfig):
            raise ConfigError(
                f"The task three_moons needs a model of kind 'three_moons', found "
                f"{type(model).__name__}. Start from the config three_moons_3heads."
            )
        if model.input_dim != FEATURES:
            raise ConfigError(
                f"`model.input_dim={model.input_dim}`, but three moons are {FEATURES} numbers. "
                f"Use `--model.input-dim {FEATURES}`."
            )
        if model.context_len < SHORTEST_CONTEXT:
            raise ConfigError(
                f"`model.context_len={model.context_len}` is too short to see a moon go round. "
                f"Use {SHORTEST_CONTEXT} or more."
            )

    def open(self, model: ModelConfig, data: DataConfig) -> "ThreeMoonsTask":
        """Check that windows fit on the time grid."""
        del data
        return ThreeMoonsTask(self, model)


class ThreeMoonsTask(Task):
    """Windows of three moons, and the clipped squared error of the next step."""

    unit = "time steps"
    loss_label = "clipped squared error"

    def __init__(self, config: ThreeMoonsTaskConfig, model: ModelConfig):
        super().__init__(model)
        self.config = config
        draw_starts(np.random.default_rng(0), 0, model.context_len)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the systems, the time grid and the first draws."""
        drawn = draw(1000, 0, context_len=self.model.context_len, batch_size=8, seed=0)
        facts = (SPLITS, PHASE, GRID, self.config.observer, [a.tolist() for a in drawn])
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def lines(self) -> list[str]:
        """Name the systems and the time step."""
        step = time_step(self.model.context_len, self.config.observer)
        counts = ", ".join(f"{len(systems)} {split}" for split, systems in SPLITS.items())
        return [
            f"data       three moons seen from the {self.config.observer}; systems: {counts}",
            f"time step  {step:.4g} time units; {1 / step:.2f} steps per time unit",
        ]

    def batches(
        self, split: str, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> Batches:
        """Draw windows of the split's systems for ever."""
        make = partial(
            windows,
            split,
            context_len=self.model.context_len,
            batch_size=batch_size,
            seed=seed,
            observer=self.config.observer,
        )
        return CountedBatches(make, process_index=process_index, process_count=process_count)

    def loss(self, model: Any, batch: Batch, *, rngs: nnx.Rngs | None = None) -> TaskLoss:
        """Sum the clipped squared error; `error` is the mean of |y - target| without clipping."""
        del rngs
        y = model(batch["x"])
        error = jnp.mean(jnp.abs(at_least_float32(y) - batch["y"]))
        return TaskLoss(*clipped_square_sum(y, batch["y"]), {"error": error})

    def finish(self, model: Any, run: RunInfo, key: jax.Array) -> list[str]:
        """Write the errors by region and by context, the plots, and the verdict."""
        from jaxmem.tasks.three_moons_report import write_report

        seed = int(jax.random.bits(key))
        return [write_report(model, run.folder, self.config, seed=seed)]
