"""Language modelling: predict each next token; the loss is the cross-entropy of the scored ones."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.backbones.base import ModelConfig, with_vocabulary
from jaxmem.data.config import DataConfig
from jaxmem.errors import CheckpointMismatch, ConfigError, DataError
from jaxmem.ops.norms import at_least_float32
from jaxmem.tasks.base import SPLITS, Batches, RunInfo, Task, TaskConfig, TaskLoss, register_task

TEMPERATURE = 0.8
"""How the texts at the end of a run are drawn."""

_PIECE = 2**20
_PIECES = 16


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
    model: Any, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None, skip_tokens: int = 0
) -> TaskLoss:
    """Run the model over a batch and sum its loss.

    Args:
      model: called as `model(tokens, segment_ids=..., rngs=...)`, returns `.logits` and `.aux`.
      batch: `tokens`, `targets` (-1 = not scored) and, for documents, `segment_ids`.
      rngs: streams for dropout; None means evaluation.
      skip_tokens: first positions of each row that are not scored.
    """
    output = model(batch["tokens"], segment_ids=batch.get("segment_ids"), rngs=rngs)
    total, count = cross_entropy_sum(
        output.logits[:, skip_tokens:], batch["targets"][:, skip_tokens:]
    )
    return TaskLoss(total, count, dict(output.aux))


@register_task("language_modeling")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelingConfig(TaskConfig):
    """Predict each next token of a text; `data` says of which."""

    products = ("samples.txt",)

    skip_tokens: int = 0
    """First positions of each row that are not scored, for want of a context."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Allow all data; what is wrong with them shows when they are opened."""
        if not 0 <= self.skip_tokens < model.context_len:
            raise ConfigError(
                f"`task.skip_tokens={self.skip_tokens}` leaves nothing to score in rows of "
                f"`model.context_len={model.context_len}`, or is negative. Use fewer."
            )

    def open(self, model: ModelConfig, data: DataConfig) -> "LanguageModeling":
        """Open the text and give it the tokenizer that the config names."""
        from jaxmem.data.pipeline import load_corpus

        corpus = load_corpus(data)
        task = LanguageModeling(model, data, corpus.tokenizer, self.skip_tokens)
        task.corpus = corpus
        return task

    def restore(self, model: ModelConfig, data: DataConfig, folder: Path) -> "LanguageModeling":
        """Take the tokenizer from the run's folder; the text is opened when it is needed."""
        from jaxmem.data.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(folder / "tokenizer.json")
        return LanguageModeling(model, data, tokenizer, self.skip_tokens)


class LanguageModeling(Task):
    """A text, its tokenizer, and windows or documents drawn from it."""

    changed = "the text has changed, with the same vocabulary"

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Any, skip_tokens: int = 0):
        super().__init__(with_vocabulary(model, tokenizer.vocab_size, owner="tokenizer"))
        self.data = data
        self.tokenizer = tokenizer
        self.skip_tokens = skip_tokens

    @cached_property
    def corpus(self) -> Any:
        """The text with the tokenizer of this task."""
        from jaxmem.data.pipeline import load_corpus

        return load_corpus(self.data, self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of both splits; see `fingerprint`."""
        return fingerprint(self.corpus)

    def lines(self) -> list[str]:
        """Name the source, and count tokens and vocabulary."""
        sizes = ", ".join(f"{len(self.corpus.tokens(split)):,} {split}" for split in SPLITS)
        vocabulary = f"{self.tokenizer.kind} vocabulary of {self.tokenizer.vocab_size:,}"
        return [f"data       {self.corpus.description}", f"tokens     {sizes}; {vocabulary}"]

    def batches(
        self, split: str, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> Batches:
        """Draw as `data.sampling` says; see `jaxmem.data.pipeline.batches`."""
        from jaxmem.data.pipeline import batches

        return batches(
            self.corpus,
            split,
            context_len=self.model.context_len,
            batch_size=batch_size,
            sampling=self.data.sampling,
            begin_of_text=self.data.begin_of_text,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    def loss(
        self, model: Any, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> TaskLoss:
        """Sum the cross-entropy of the scored tokens."""
        return language_model_loss(model, batch, rngs=rngs, skip_tokens=self.skip_tokens)

    def files(self) -> dict[str, str]:
        """Keep the tokenizer with the run."""
        return {"tokenizer.json": json.dumps(self.tokenizer.to_dict()) + "\n"}

    def check_files(self, folder: Path) -> None:
        """Refuse another vocabulary, with which the embeddings would be meaningless."""
        from jaxmem.data.tokenizers import load_tokenizer

        path = folder / "tokenizer.json"
        saved, found = load_tokenizer(path), self.tokenizer
        if saved.fingerprint != found.fingerprint:
            raise CheckpointMismatch(
                f"{path} holds another vocabulary ({saved.kind}, {saved.vocab_size} tokens) than "
                f"the data now give ({found.kind}, {found.vocab_size} tokens): the text "
                "has changed. Restore it, or choose another `run.dir`."
            )

    def finish(self, model: Any, run: RunInfo, key: jax.Array) -> list[str]:
        """Write samples.txt; the texts depend on the parameters and the key only."""
        texts = self.sample_texts(model, run.samples, run.sample_tokens, key)
        numbered = (f"--- sample {n} ---\n{text}\n\n" for n, text in enumerate(texts, start=1))
        (run.folder / "samples.txt").write_text("".join(numbered), encoding="utf-8")
        return texts

    def sample_texts(self, model: Any, number: int, tokens: int, key: jax.Array) -> list[str]:
        """Draw texts from an empty prompt."""
        from jaxmem.generate.sampling import Sampling
        from jaxmem.generate.text import generate_text

        if not (number and tokens):
            return []
        return generate_text(
            model,
            self.tokenizer,
            [self._start()] * number,
            max_new_tokens=tokens,
            sampling=Sampling(temperature=TEMPERATURE),
            key=key,
            begin_of_text=self.data.begin_of_text,
        )

    def _start(self) -> str:
        """Return the empty prompt, or the first token's text where an empty one is impossible."""
        from jaxmem.generate.text import prompt_tokens

        try:
            prompt_tokens(self.tokenizer, "", self.data.begin_of_text)
        except DataError:
            return self.tokenizer.decode([0])
        return ""


def fingerprint(corpus: Any) -> str:
    """Return a hash of the tokens of both splits.

    Memory-mapped tokens may be larger than the memory: of these, the length and up to 16 pieces of
    1 MiB, evenly spread, are hashed. Times of files do not count, so a copy has the same hash.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        tokens = corpus.tokens(split)
        digest.update(f"{split} {tokens.dtype.str} {len(tokens)}\n".encode())
        for piece in _pieces(tokens):
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()


def _pieces(tokens: np.ndarray) -> list[np.ndarray]:
    size = _PIECE // tokens.itemsize
    if not isinstance(tokens, np.memmap) or len(tokens) <= size * _PIECES:
        return [tokens]
    starts = np.linspace(0, len(tokens) - size, _PIECES).astype(np.int64)
    return [tokens[start : start + size] for start in starts]
