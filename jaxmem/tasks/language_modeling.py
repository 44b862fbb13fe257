"""Language modelling: predict each next token; the loss is the cross-entropy of the scored ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.ops.norms import at_least_float32

LOSS_PREFIX = "loss_"
"""A model's `aux` entries whose names start so are added to the training loss."""


class TaskLoss(NamedTuple):
    """Sums over the scored tokens of one (micro-)batch, so that parts add up exactly."""

    total: Float[Array, ""]
    """Sum of the cross-entropy in nats, float32 or wider."""
    tokens: Int[Array, ""]
    """Number of scored tokens, int32."""
    aux: dict[str, Float[Array, ""]]
    """The model's own means: `loss_*` are training losses, the rest are metrics."""


def cross_entropy_sum(
    logits: Float[Array, "B T X"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum -log softmax(logits)[target] over the positions whose target is not negative.

    Returns:
      The sum in nats (float32 or wider) and the number of scored positions.
    """
    logits = at_least_float32(logits)
    scored = targets >= 0
    index = jnp.where(scored, targets, 0)[..., None]
    picked = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(scored, losses, 0.0)), jnp.sum(scored, dtype=jnp.int32)


def language_model_loss(
    model: nnx.Module, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
) -> TaskLoss:
    """Run the model over a batch and sum its loss.

    Args:
      model: called as `model(tokens, segment_ids=..., rngs=...)`, returns `.logits` and `.aux`.
      batch: `tokens`, `targets` (-1 = not scored) and, for packed rows, `segment_ids`.
      rngs: streams for dropout; None means evaluation.
    """
    output = model(batch["tokens"], segment_ids=batch.get("segment_ids"), rngs=rngs)
    total, tokens = cross_entropy_sum(output.logits, batch["targets"])
    return TaskLoss(total, tokens, dict(output.aux))
