"""Find a needle in a haystack: say the pass key that a prompt hides, at any length and depth.

The loss is the cross-entropy of the characters of the answer, see `jaxmem.data.needle`. When the
run ends, the model answers prompts of several lengths and depths: it reads them into its state
chunk by chunk and goes on greedily for 10 characters, of which the digits of the first word count.
Lengths beyond `model.context_len` are read with a state that holds them.

Reference: 2Mamba2Furious (arXiv 2602.17363), needle in a haystack. Differs: only new characters
  are scored.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from jaxmem.backbones.base import ModelConfig, with_vocabulary
from jaxmem.data.config import DataConfig
from jaxmem.data.needle import (
    NEEDLE,
    QUALITIES,
    QUESTION,
    SHORTEST,
    SHORTEST_ROW,
    SUBJECTS,
    TOKENIZER,
    Prompt,
    draw_prompt,
    draw_rows,
    is_right,
)
from jaxmem.data.scored import ScoredRows
from jaxmem.errors import ConfigError
from jaxmem.generate.prefill import with_context
from jaxmem.generate.sampling import Sampling
from jaxmem.generate.text import generate_text
from jaxmem.tasks.base import RunInfo, TaskConfig, register_task
from jaxmem.tasks.scored_rows import ScoredRowsTask

GENERATOR = 1
"""Raised when the same config gives other prompts."""
NEW_TOKENS = 10
"""Characters that a model may add to a prompt."""

Accuracy = list[list[float | None]]
"""Share of right answers by length and depth; None where the model cannot read so much."""


@register_task("needle")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Say the pass key that is hidden in a haystack."""

    products: ClassVar[tuple[str, ...]] = ("needle.json", "needle.md", "plots/needle.png")

    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Characters of the prompts that are answered at the end of the run."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the key stands in them: 0 is the start of the haystack, 1 its end."""
    test_prompts: int = 20
    """Prompts of each length and depth."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Ask for rows and prompts in which needle and question fit."""
        super().check(model, data)
        if model.context_len < SHORTEST_ROW:
            raise ConfigError(
                f"`model.context_len={model.context_len}` is too short for needle, question and "
                f"answer. Use {SHORTEST_ROW} or more."
            )
        if not self.lengths or min(self.lengths) < SHORTEST or self.test_prompts < 1:
            raise ConfigError(
                f"`task.lengths={self.lengths}`, `task.test_prompts={self.test_prompts}`. Use "
                f"lengths of {SHORTEST} or more, which needle and question take, and at least one "
                "prompt."
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"`task.depths={self.depths}`. Use depths from 0 to 1.")

    def open(self, model: ModelConfig, data: DataConfig) -> "NeedleTask":
        """Count the characters."""
        del data
        return NeedleTask(self, with_vocabulary(model, TOKENIZER.vocab_size, owner="tokenizer"))


class NeedleTask(ScoredRowsTask):
    """Prompts with their answers; `accuracy` is the share of right characters of the answers."""

    unit = "characters"
    loss_label = "loss (nats per character of the answer)"

    def __init__(self, config: NeedleConfig, model: ModelConfig):
        super().__init__(model)
        self.config = config

    @property
    def fingerprint(self) -> str:
        """A hash of what the prompts depend on."""
        facts = (GENERATOR, SUBJECTS, QUALITIES, NEEDLE, QUESTION, self.model.context_len)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def lines(self) -> list[str]:
        """Say what a row holds."""
        return [
            f"data       prompts of {SHORTEST} characters or more that hide a pass key, with the "
            f"answer up to {self.model.context_len} characters; {TOKENIZER.vocab_size} kinds"
        ]

    def draw(self, rng: np.random.Generator, rows: int) -> ScoredRows:
        """Draw prompts with their answers."""
        return draw_rows(rng, rows, self.model.context_len)

    def finish(self, model: Any, run: RunInfo, key: jax.Array) -> list[str]:
        """Answer prompts of all lengths and depths; write JSON, a table and a heat map."""
        config = self.config
        accuracy = self.answer(model, seed=int(jax.random.bits(key)))
        facts = {
            "trained_at": self.model.context_len,
            "lengths": config.lengths,
            "depths": config.depths,
            "accuracy": accuracy,
        }
        text = f"{json.dumps(facts, indent=2)}\n"
        (run.folder / "needle.json").write_text(text, encoding="utf-8")
        title = f"Right answers by length and depth, trained at {self.model.context_len}."
        table = f"{title}\n\n{accuracy_table(accuracy, config.lengths, config.depths)}"
        (run.folder / "needle.md").write_text(f"{table}\n", encoding="utf-8")
        picture = run.folder / "plots" / "needle.png"
        heat_map(accuracy, config.lengths, config.depths, picture, title=title.rstrip("."))
        return [table]

    def answer(self, model: Any, *, seed: int) -> Accuracy:
        """Return the accuracy by length and depth; the prompts depend on the seed only."""
        # What is read with a prompt of each length: all new tokens but the last one.
        sizes = {length: length + NEW_TOKENS - 1 for length in self.config.lengths}
        held = max((size for size in sizes.values() if self.can_read(size)), default=None)
        if held is None:
            return [[None] * len(self.config.depths) for _ in sizes]
        # One size of state for all lengths: the decode step is compiled once.
        reader = nnx.split(with_context(model, held))
        return [
            self._by_depth(reader, length, seed)
            if size <= held
            else [None] * len(self.config.depths)
            for length, size in sizes.items()
        ]

    def _by_depth(self, model: tuple[Any, Any], length: int, seed: int) -> list[float | None]:
        """Return the accuracy by depth for prompts of a length."""
        found: list[float | None] = []
        for number, depth in enumerate(self.config.depths):
            rng = np.random.default_rng([seed, length, number])
            drawn = [draw_prompt(rng, length, depth) for _ in range(self.config.test_prompts)]
            found.append(share_right(model, drawn))
        return found


def share_right(model: tuple[Any, Any], prompts: Sequence[Prompt]) -> float:
    """Return the share of prompts answered rightly."""
    said = generate_text(
        model,
        TOKENIZER,
        [prompt.text for prompt in prompts],
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=0.0),
        key=jax.random.key(0),
    )
    answers = zip(said, prompts, strict=True)
    return float(np.mean([is_right(text, prompt.key) for text, prompt in answers]))


def accuracy_table(accuracy: Accuracy, lengths: Sequence[int], depths: Sequence[float]) -> str:
    """Return accuracy by length and depth as Markdown."""
    head = ["length", *(f"depth {depth:.0%}" for depth in depths)]
    rows = [
        [str(length), *("fails" if value is None else f"{value:.0%}" for value in row)]
        for length, row in zip(lengths, accuracy, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def heat_map(
    accuracy: Accuracy, lengths: Sequence[int], depths: Sequence[float], path: Path, *, title: str
) -> None:
    """Draw accuracy by length and depth.

    Args:
      accuracy: by length and depth.
      lengths: of the prompts, in characters.
      depths: of the key.
      path: of the PNG; its folder is made.
      title: shown above the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = np.array(accuracy, float).T
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (depth, length), value in np.ndenumerate(values):
        text = "fails" if np.isnan(value) else f"{value:.2f}"
        ink = "w" if value < 0.6 else "k"
        axes.text(length, depth, text, ha="center", va="center", color=ink)
    axes.set(title=title, xlabel="prompt (characters)", ylabel="depth of the key")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.colorbar(image, ax=axes, label="right answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
