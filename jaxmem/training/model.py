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

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.errors import CheckpointMismatch, ConfigError
from jaxmem.tasks.language_modeling import language_model_loss
from jaxmem.training.checkpoint import Checkpoints, UnreadableCheckpoint
from jaxmem.training.config import RunConfig
from jaxmem.training.folder import saved_config
from jaxmem.training.layout import ModelParts, Params, take_apart

PRECISIONS = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}
"""Type of activations by the name of the policy; parameters are float32 in both."""


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a run's model, and the model taken apart."""

    config: DecoderConfig
    compute_dtype: jnp.dtype
    parts: ModelParts[Decoder] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", take_apart(self.make))

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int) -> "Model":
        """Describe the model of a run whose tokenizer has this vocabulary.

        Raises:
          ConfigError: `model.vocab_size` is set and smaller than the tokenizer's.
        """
        wanted = config.model.vocab_size
        if wanted and wanted < vocab_size:
            raise ConfigError(
                f"`model.vocab_size={wanted}` is smaller than the tokenizer's {vocab_size}. "
                "Use 0 to take the tokenizer's, or a larger number."
            )
        model = dataclasses.replace(config.model, vocab_size=wanted or vocab_size)
        return cls(model, PRECISIONS[config.run.precision])

    def make(self, rngs: nnx.Rngs) -> Decoder:
        """Build the model with fresh parameters."""
        return Decoder(self.config, rngs=rngs, compute_dtype=self.compute_dtype)


class LoadedRun(NamedTuple):
    """A trained model and what belongs to it."""

    config: RunConfig
    model: Decoder
    tokenizer: Any
    step: int
    """Updates that the parameters have seen."""


def load_run(folder: Path, *, checkpoint: Literal["best", "last"] | int = "best") -> LoadedRun:
    """Load a run's model from its folder, onto one device.

    Args:
      folder: of the run.
      checkpoint: the one with the best validation loss, the last one, or that of a step. If the
        best or the last one is damaged, the newest readable one, with a message on stderr.

    Raises:
      CheckpointMismatch: this is no run folder, it has no such checkpoint, or it cannot be read.
      DataError: the tokenizer of the run is missing or damaged.
    """
    from jaxmem.data.tokenizers import load_tokenizer

    config = saved_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = Model.of(config, tokenizer.vocab_size)
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
    return LoadedRun(config, model.parts.merge_single(single), tokenizer, step)


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


def mean_loss(model: nnx.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
    """Return the mean loss in nats over the scored tokens of all batches, and their number."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def sums(params: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        out = language_model_loss(nnx.merge(graphdef, params), batch)
        return out.total, out.tokens

    total, tokens = 0.0, 0
    for batch in batches:
        loss, count = jax.device_get(sums(params, dict(batch)))
        total += float(loss)
        tokens += int(count)
    return total / max(tokens, 1), tokens
