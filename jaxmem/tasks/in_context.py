"""In-context language learning: continue strings of an automaton that was never seen before.

A row is a prompt: strings of one random automaton, joined by a separator (see
`jaxmem.data.automata`). The loss is the cross-entropy of every real token but the first, symbols
and separators alike. The two metrics are about the automaton only. Where strings end is not its
doing, so they compare what the model says of the 18 symbols, renormalised, with the symbols that
are legal in the automaton's node, at every scored token:

  q = softmax(logits[:18]),  p = uniform over the legal symbols,
  accuracy = mean of [argmax q is legal],  tvd = mean of ½ Σ_s |q_s - p_s|.

At a string's end, where the token to be predicted is a separator, p is that of the node in which
the string stops, as if it went on; behind a separator it is that of the start node. Padding is
never scored.

Reference: Memory Mosaics, section on in-context language learning; RegBench
(https://github.com/berlino/seq_icl).
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.backbones.base import ModelConfig, with_vocabulary
from jaxmem.data.automata import (
    PAD,
    SYMBOLS,
    VOCABULARY,
    Automata,
    Prompts,
    PromptShape,
    draw_automata,
    draw_prompts,
)
from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError
from jaxmem.ops.norms import at_least_float32
from jaxmem.tasks.base import (
    SPLITS,
    Batches,
    CountedBatches,
    Task,
    TaskConfig,
    TaskLoss,
    register_task,
)
from jaxmem.tasks.language_modeling import cross_entropy_sum


@register_task("in_context")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig(TaskConfig):
    """Learn the language of a new automaton from a few of its strings."""

    automata: int = 5000
    """Automata to train on; every training prompt is new, from one of them."""
    test_prompts: int = 500
    """Validation prompts, each of an automaton of its own that is not trained on."""
    max_nodes: int = 10
    """Most nodes of an automaton; the fewest are 2."""
    prompt: PromptShape = dataclasses.field(default_factory=PromptShape)
    """Strings of a prompt; what does not fit `model.context_len` is cut."""
    seed: int = 0
    """Seed of all automata and of the validation prompts, whatever the run's seed."""

    def __post_init__(self) -> None:
        for name in ("automata", "test_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`task.{name}={getattr(self, name)}` must be 1 or more.")
        if self.max_nodes < 2:
            raise ConfigError(f"`task.max_nodes={self.max_nodes}` must be 2 or more.")

    def open(self, model: ModelConfig, data: DataConfig) -> "InContext":
        """Draw the automata and the validation prompts."""
        del data
        return InContext(self, with_vocabulary(model, VOCABULARY, owner="task"))


class InContext(Task):
    """Automata to train on, and prompts of others to validate on."""

    def __init__(self, config: InContextConfig, model: ModelConfig):
        super().__init__(model)
        self.config = config

    @cached_property
    def automata(self) -> dict[str, Automata]:
        """The automata of both splits; those of validation do not depend on how many others."""
        config = self.config
        rng = {split: np.random.default_rng([config.seed, i]) for i, split in enumerate(SPLITS)}
        test = draw_automata(rng["validation"], config.test_prompts, config.max_nodes)
        train = draw_automata(rng["train"], config.automata, config.max_nodes, apart_from=test)
        return {"train": train, "validation": test}

    @cached_property
    def test_prompts(self) -> Prompts:
        """The validation prompts."""
        rng = np.random.default_rng([self.config.seed, len(SPLITS)])
        return self._draw(rng, self.automata["validation"])

    def _draw(self, rng: np.random.Generator, automata: Automata) -> Prompts:
        return draw_prompts(rng, automata, self.config.prompt, self.model.context_len + 1)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all automata and of the validation prompts."""
        digest = hashlib.sha256()
        for array in (*self.automata["train"], *self.automata["validation"], *self.test_prompts):
            digest.update(np.ascontiguousarray(array, np.int64).data)
        return digest.hexdigest()

    def lines(self) -> list[str]:
        """Count automata and prompts, and say how much of a row is padding."""
        config, prompt = self.config, self.config.prompt
        fill = float(np.mean(self.test_prompts.tokens != PAD))
        return [
            f"data       {config.automata:,} random automata of 2 to {config.max_nodes} nodes; "
            f"validation on {config.test_prompts:,} prompts of others",
            f"tokens     prompts of {prompt.min_strings} to {prompt.max_strings} strings of 1 to "
            f"{prompt.max_length} symbols, cut at {self.model.context_len}; {fill:.0%} filled",
        ]

    def batches(
        self, split: str, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> Batches:
        """Draw new prompts for training; go round the fixed ones for validation."""
        train = self.automata["train"]

        def drawn(number: int) -> Mapping[str, np.ndarray]:
            rng = np.random.default_rng([seed, number])
            return _example(self._draw(rng, train.take(rng.integers(len(train), size=batch_size))))

        def fixed(number: int) -> Mapping[str, np.ndarray]:
            rows = (number * batch_size + np.arange(batch_size)) % self.config.test_prompts
            return _example(Prompts(*(array[rows] for array in self.test_prompts)))

        return CountedBatches(
            drawn if split == "train" else fixed,
            process_index=process_index,
            process_count=process_count,
        )

    def loss(
        self, model: Any, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> TaskLoss:
        """Sum the cross-entropy of the real tokens; `accuracy` and `tvd` are means over them."""
        output = model(batch["tokens"], rngs=rngs)
        total, count = cross_entropy_sum(output.logits, batch["targets"])
        accuracy, tvd = legality_sums(output.logits, batch["legal"])
        count_float = jnp.maximum(count, 1)
        metrics = {"accuracy": accuracy / count_float, "tvd": tvd / count_float}
        return TaskLoss(total, count, dict(output.aux) | metrics)


def _example(prompts: Prompts) -> dict[str, np.ndarray]:
    targets = prompts.tokens[:, 1:]
    return {
        "tokens": prompts.tokens[:, :-1],
        "targets": np.where(targets == PAD, np.int32(-1), targets),
        "legal": prompts.legal[:, 1:],
    }


def legality_sums(
    logits: Float[Array, "B T X"], legal: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compare predictions with the automaton, where `legal` has a bit; see the module's text.

    Args:
      logits: of the whole vocabulary.
      legal: bit s is set where symbol s is legal; 0 at padding, which does not count.

    Returns:
      The number of positions whose likeliest symbol is legal, and the sum over positions of the
      total variation distance, 0 to 1 each.
    """
    logits = at_least_float32(logits[..., :SYMBOLS])
    allowed = (legal[..., None] >> jnp.arange(SYMBOLS)) & 1
    best = jnp.argmax(logits, axis=-1)[..., None]
    right = jnp.take_along_axis(allowed, best, axis=-1)[..., 0]
    true = allowed / jnp.maximum(jnp.sum(allowed, axis=-1, keepdims=True), 1)
    distance = 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(logits, axis=-1) - true), axis=-1)
    real = legal != 0
    return (
        jnp.sum(jnp.where(real, right, 0)).astype(logits.dtype),
        jnp.sum(jnp.where(real, distance, 0.0)),
    )
