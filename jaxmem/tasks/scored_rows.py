"""What tasks on drawn rows share, of which some tokens are scored: batches, loss and accuracy."""

from abc import abstractmethod
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.scored import ScoredRows
from jaxmem.tasks.base import SPLITS, Batch, Batches, CountedBatches, Task, TaskLoss
from jaxmem.tasks.language_modeling import cross_entropy_sum


class ScoredRowsTask(Task):
    """Rows drawn anew for every batch; training and validation rows are of the same kind."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> ScoredRows:
        """Draw rows of `model.context_len` tokens."""

    def batches(
        self, split: str, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> Batches:
        """Draw rows for ever."""

        def make(number: int) -> dict[str, np.ndarray]:
            rng = np.random.default_rng([seed, SPLITS.index(split), number])
            return self.draw(rng, batch_size)._asdict()

        return CountedBatches(make, process_index=process_index, process_count=process_count)

    def loss(self, model: Any, batch: Batch, *, rngs: nnx.Rngs | None = None) -> TaskLoss:
        """Sum the cross-entropy of the scored tokens; `accuracy` is the share of right ones.

        A token is right if it is the likeliest after the right ones before it.
        """
        output = model(batch["tokens"], rngs=rngs)
        total, count = cross_entropy_sum(output.logits, batch["targets"])
        accuracy = right_answers(output.logits, batch["targets"]) / jnp.maximum(count, 1)
        return TaskLoss(total, count, dict(output.aux) | {"accuracy": accuracy})

    def can_read(self, tokens: int) -> bool:
        """Say whether the model has positions for so many tokens: learned ones end somewhere."""
        model = self.model
        learned = isinstance(model, DecoderConfig) and model.positions == "learned"
        return not learned or tokens <= model.context_len


def right_answers(logits: Float[Array, "B T X"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Count the scored positions whose likeliest token is the target."""
    right = (jnp.argmax(logits, axis=-1) == targets) & (targets >= 0)
    return jnp.sum(right).astype(jnp.float32)
