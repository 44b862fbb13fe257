"""Evaluate a model on a whole split: loss, perplexity and bits, with confidence intervals."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmem.data.pipeline import Corpus, sequential_batches
from jaxmem.data.sources import Split
from jaxmem.tasks.language_modeling import cross_entropy_sum

# Decoding a split to count its bytes costs memory; token arrays may be far larger than it.
MOST_TOKENS_TO_DECODE = 50_000_000
_Z95 = 1.959964


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy over the scored tokens of a split, in nats per token."""

    loss: float
    """Nats per token."""
    loss_margin: float | None
    """Half width of the 95 % confidence interval of ``loss``; None with a single window."""
    tokens: int
    """Scored tokens."""
    windows: int
    """Non-overlapping windows, each seen without the one before it, or documents."""
    tokens_per_character: float | None
    """None where the text of the split is not known."""
    tokens_per_byte: float | None
    """Per byte of UTF-8; None where the text of the split is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Return all measures with their intervals [low, high], as JSON values."""
        bits = 1 / math.log(2)
        rates = {
            "bits_per_token": bits,
            "bits_per_character": _times(bits, self.tokens_per_character),
            "bits_per_byte": _times(bits, self.tokens_per_byte),
        }
        found: dict[str, Any] = {"loss": self.loss, "perplexity": math.exp(self.loss)}
        found |= {name: self.loss * rate for name, rate in rates.items() if rate is not None}
        if self.loss_margin is not None:
            ends = (self.loss - self.loss_margin, self.loss + self.loss_margin)
            found["loss_ci95"] = list(ends)
            found["perplexity_ci95"] = [math.exp(end) for end in ends]
            for name, rate in rates.items():
                if rate is not None:
                    found[f"{name}_ci95"] = [end * rate for end in ends]
        return found | {"tokens": self.tokens, "windows": self.windows}


def evaluate(
    model: nnx.Module,
    corpus: Corpus,
    split: Split,
    *,
    context_len: int,
    batch_size: int,
    skip_tokens: int = 0,
    sampling: str = "windows",
    begin_of_text: bool = False,
) -> Evaluation:
    """Score every token of a split but the first, in windows of ``context_len``.

    With sampling="documents", score the beginning of every document instead, as in training.

    The interval treats the windows as independent draws: it is that of a ratio of sums,
    loss ± 1.96 sqrt(W/(W-1) Σ_w (s_w - loss n_w)²) / Σ_w n_w over the W windows with summed losses
    s_w and scored tokens n_w. Neighbouring windows of one text resemble each other, so it is
    somewhat too narrow.

    Args:
      model: a decoder.
      corpus: the text, with the tokenizer of the model.
      split: which part of it.
      context_len: tokens per window.
      batch_size: windows per call of the model; changes nothing but speed and memory.
      skip_tokens: first positions of each window that are not scored.
      sampling: windows or documents; see `jaxmem.data.pipeline.sequential_batches`.
      begin_of_text: whether documents begin with the vocabulary's beginning-of-text token.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def score(params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(batch["tokens"]).logits[:, None, skip_tokens:]
        return jax.vmap(cross_entropy_sum)(logits, batch["targets"][:, None, skip_tokens:])

    sums, counts = [], []
    for batch in sequential_batches(
        corpus,
        split,
        context_len=context_len,
        batch_size=batch_size,
        sampling=sampling,
        begin_of_text=begin_of_text,
    ):
        batch_sums, batch_counts = jax.device_get(score(params, batch))
        sums.append(batch_sums)
        counts.append(batch_counts)
    total, scored = np.concatenate(sums).astype(np.float64), np.concatenate(counts)
    total, scored = total[scored > 0], scored[scored > 0].astype(np.int64)
    tokens, windows = int(scored.sum()), len(scored)
    loss = float(total.sum() / tokens)
    characters, size = text_size(corpus, split)
    length = len(corpus.tokens(split)) - 1
    return Evaluation(
        loss=loss,
        loss_margin=margin(total, scored),
        tokens=tokens,
        windows=windows,
        tokens_per_character=length / characters if characters else None,
        tokens_per_byte=length / size if size else None,
    )


def margin(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the half width of the 95 % interval of Σ sums / Σ counts; None for one window."""
    windows = len(sums)
    if windows < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    spread = math.sqrt(windows / (windows - 1) * float(np.sum(residuals**2)))
    return _Z95 * spread / float(counts.sum())


def text_size(corpus: Corpus, split: Split) -> tuple[int, int] | tuple[None, None]:
    """Return the characters and UTF-8 bytes of the scored tokens' text; None if it is too long."""
    tokens = corpus.tokens(split)
    if len(tokens) > MOST_TOKENS_TO_DECODE:
        return None, None
    text = corpus.tokenizer.decode(np.asarray(tokens[1:]))
    return len(text), len(text.encode("utf-8", "surrogatepass"))


def _times(a: float, b: float | None) -> float | None:
    return None if b is None else a * b
