"""The data of a run: opened, and found large enough, before anything is written."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmem.training.config import RunConfig
from jaxmem.training.feed import EvalSet, Feed, Place
from jaxmem.training.model import Model
from jaxmem.training.state import stream_seed

SPLITS = {"eval_train_loss": "train", "val_loss": "validation"}
"""Evaluated splits by the name of their field in the metrics."""

_PIECE = 2**20
_PIECES = 16


@dataclass(frozen=True)
class RunData:
    """A corpus, the batches drawn from it, and the model that its vocabulary asks for."""

    corpus: Any
    model: Model
    feed: Feed
    """Training batches; the first one was read."""
    eval_sets: dict[str, EvalSet]
    """Evaluation batches by the name of their field in the metrics."""


def open_data(config: RunConfig, mesh: Mesh) -> RunData:
    """Open the data of a run.

    Raises:
      DataError: they are missing, damaged or too small.
      ConfigError: they do not fit the config.
    """
    from jaxmem.data.pipeline import load_corpus

    corpus = load_corpus(config.data)
    model = Model.of(config, corpus.tokenizer.vocab_size)
    place = Place(mesh)
    feed = Feed(_batches(config, corpus, "train", "data"), place)
    feed.peek()
    eval_sets = {
        name: EvalSet(_batches(config, corpus, split, "eval"), config.run.eval_batches, place)
        for name, split in SPLITS.items()
    }
    return RunData(corpus, model, feed, eval_sets)


def data_lines(corpus: Any) -> list[str]:
    """Return the lines about the data for the head of the log."""
    tokenizer = corpus.tokenizer
    sizes = ", ".join(f"{len(corpus.tokens(split)):,} {split}" for split in SPLITS.values())
    return [
        f"data       {corpus.description}",
        f"tokens     {sizes}; {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,}",
    ]


def fingerprint(corpus: Any) -> str:
    """Return a hash of the tokens of both splits.

    Memory-mapped tokens may be larger than the memory: of these, the length and up to 16 pieces of
    1 MiB, evenly spread, are hashed. Times of files do not count, so a copy has the same hash.
    """
    digest = hashlib.sha256()
    for split in SPLITS.values():
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


def _batches(config: RunConfig, corpus: Any, split: str, stream: str) -> Any:
    """Return this process's iterator of batches; evaluation uses those of one micro-batch."""
    from jaxmem.data.pipeline import batches

    parts = 1 if stream == "data" else config.optim.accumulate
    return batches(
        corpus,
        split,
        context_len=config.model.context_len,
        batch_size=config.data.batch_size // parts,
        sampling=config.data.sampling,
        seed=stream_seed(config.run.seed, stream),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
