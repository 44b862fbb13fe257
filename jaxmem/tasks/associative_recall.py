"""Recall facts out of a haystack, and measure at the end how far beyond the training length.

The loss is the cross-entropy of the values that are asked for, see `jaxmem.data.recall`. When the
run ends, rows of other lengths are measured, which differ in the amount of filler only.
"""

import dataclasses
import hashlib
import json
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxmem.backbones.base import ModelConfig, with_vocabulary
from jaxmem.data.config import DataConfig
from jaxmem.data.recall import RecallShape, draw_rows
from jaxmem.data.scored import ScoredRows
from jaxmem.errors import ConfigError
from jaxmem.tasks.base import RunInfo, TaskConfig, register_task
from jaxmem.tasks.scored_rows import ScoredRowsTask, right_answers

GENERATOR = 1
"""Raised when the same config gives other rows."""


@register_task("associative_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecallConfig(TaskConfig):
    """Answer questions about facts that lie in a haystack."""

    products: ClassVar[tuple[str, ...]] = ("extrapolation.json", "extrapolation.md")

    rows: RecallShape = dataclasses.field(default_factory=RecallShape)
    """What a row holds; it is `model.context_len` tokens long."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Lengths of the rows that are measured at the end of the run."""
    test_rows: int = 128
    """How many rows of each length these are."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Ask for lengths in which facts and questions fit."""
        super().check(model, data)
        shortest = self.rows.shortest
        if min(model.context_len, *self.lengths) < shortest or self.test_rows < 1:
            raise ConfigError(
                f"`model.context_len={model.context_len}`, `task.lengths={self.lengths}`, "
                f"`task.test_rows={self.test_rows}`. Use lengths of {shortest} or more, which "
                "facts and questions take, and at least one row."
            )

    def open(self, model: ModelConfig, data: DataConfig) -> "AssociativeRecall":
        """Count the vocabulary."""
        del data
        vocabulary = self.rows.vocabulary
        return AssociativeRecall(self, with_vocabulary(model, vocabulary, owner="task"))


class AssociativeRecall(ScoredRowsTask):
    """Facts and questions about them; `accuracy` is the share of right answers."""

    unit = "answers"
    loss_label = "loss (nats per answer)"

    def __init__(self, config: AssociativeRecallConfig, model: ModelConfig):
        super().__init__(model)
        self.config = config

    @property
    def fingerprint(self) -> str:
        """A hash of what the rows depend on."""
        rows = self.config.rows
        layout = () if rows.layout == "scattered" else (rows.layout,)
        facts = (GENERATOR, rows, self.model.context_len, *layout)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def lines(self) -> list[str]:
        """Say what a row holds."""
        rows = self.config.rows
        where = "among filler" if rows.layout == "scattered" else "at the start"
        return [
            f"data       rows of {self.model.context_len} tokens: {rows.pairs} facts {where}, "
            f"{rows.questions} questions; {rows.keys} keys, {rows.values} values"
        ]

    def draw(self, rng: np.random.Generator, rows: int) -> ScoredRows:
        """Draw facts, filler and questions."""
        return draw_rows(rng, rows, self.model.context_len, self.config.rows)

    def finish(self, model: Any, run: RunInfo, key: jax.Array) -> list[str]:
        """Measure accuracy at all lengths and write it as JSON and as a table."""
        seed = int(jax.random.bits(key))
        accuracy = {str(n): self._accuracy(model, n, seed) for n in self.config.lengths}
        result = {"trained_at": self.model.context_len, "accuracy": accuracy}
        text = f"{json.dumps(result, indent=2)}\n"
        (run.folder / "extrapolation.json").write_text(text, encoding="utf-8")
        lines = [
            f"Accuracy in rows of other lengths, trained at {self.model.context_len}.",
            "",
            "| length | accuracy |",
            "| --- | --- |",
            *(f"| {n} | {'fails' if a is None else f'{a:.1%}'} |" for n, a in accuracy.items()),
        ]
        table = "\n".join(lines)
        (run.folder / "extrapolation.md").write_text(f"{table}\n", encoding="utf-8")
        return [table]

    def _accuracy(self, model: Any, length: int, seed: int) -> float | None:
        """Return the accuracy in rows of a length; None if the model cannot read them."""
        if not self.can_read(length):
            return None
        graph, params = nnx.split(model)

        @jax.jit
        def count(params: Any, tokens: Array, targets: Array) -> Array:
            return right_answers(nnx.merge(graph, params)(tokens).logits, targets)

        draw = partial(draw_rows, np.random.default_rng([seed, length]))
        right = 0
        # Few rows at once: attention over a row may take memory that grows with its square.
        for done in range(0, self.config.test_rows, 8):
            rows = draw(min(8, self.config.test_rows - done), length, self.config.rows)
            right += int(count(params, *rows))
        return right / (self.config.test_rows * self.config.rows.questions)
