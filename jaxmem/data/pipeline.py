"""From a source to batches: random windows or documents, packed or alone, as a grain iterator.

A batch is a dict of int32 arrays [B, T]: ``tokens``, ``targets`` (-1 = not scored) and, for
documents, ``segment_ids`` (0 = padding). Batch k is a function of (corpus, split, sizes, seed,
k); the iterator's state is k, so it stays valid when the number of processes changes.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from jaxmem.data.config import DataConfig
from jaxmem.data.packing import PackingPlan, document_row, fill_row, plan_packing, shift_row
from jaxmem.data.sources import SPLITS, EncodedSplit, Source, load_source
from jaxmem.data.tokenizers import Tokenizer
from jaxmem.errors import ConfigError, DataError, unknown_name

Batch = dict[str, Int32[np.ndarray, "B T"]]
# More batches than any run makes; the largest length that a Python container may report is 2**63.
_ENDLESS = 2**62
# Batches made ahead of the one that is handed out; enough to hide a slow disk read.
_PREFETCH = 4


@runtime_checkable
class BatchIterator(Protocol):
    """What grain's iterators offer, and all that training uses of them."""

    def __next__(self) -> Batch:
        """Return the next batch; there is always one."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class Corpus:
    """A source and a tokenizer; each split is encoded when it is first asked for, then kept."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        """Join the two; see `load_corpus`."""
        self.tokenizer = tokenizer
        self._source = source
        self._encoded: dict[str, EncodedSplit] = {}

    @property
    def name(self) -> str:
        """Short name of the source."""
        return self._source.name

    @property
    def description(self) -> str:
        """One line: what was chosen (by ``auto`` too) and how it is split."""
        return self._source.description

    def tokens(self, split: str) -> Integer[np.ndarray, "N"]:
        """Return all tokens of a split; uint16 if the vocabulary fits, else uint32, or as stored.

        Raises:
          DataError: fewer than two tokens, or text outside the vocabulary.
        """
        return self._encode(split).tokens

    def documents(self, split: str) -> list[Integer[np.ndarray, "N"]] | None:
        """Return the documents of a split, which are ``tokens`` in parts; None for token arrays."""
        encoded = self._encode(split)
        if encoded.starts is None:
            return None
        return np.split(encoded.tokens, encoded.starts[1:])

    def plan(self, split: str, row_len: int) -> PackingPlan:
        """Pack the documents of a split into rows of ``row_len`` tokens.

        Raises:
          ConfigError: the source is a token array.
        """
        tokens, starts = self._whole_documents(split, "packed")
        return plan_packing(np.diff(starts, append=len(tokens)), row_len)

    def row(self, split: str, plan: PackingPlan, index: int) -> dict[str, Int32[np.ndarray, "T"]]:
        """Make the training example of one packed row, arrays [row_len - 1]."""
        return shift_row(*fill_row(plan, index, *self._whole_documents(split, "packed")))

    def num_documents(self, split: str) -> int:
        """Count the documents of a split.

        Raises:
          ConfigError: the source is a token array.
        """
        return len(self._whole_documents(split, "documents")[1])

    def begin(self, wanted: bool) -> int | None:
        """Return the beginning-of-text token, if it is wanted.

        Raises:
          ConfigError: the vocabulary has none.
        """
        begin = self.tokenizer.begin_of_text
        if wanted and begin is None:
            raise ConfigError(
                f"data.begin_of_text is set, but the {self.tokenizer.kind} vocabulary has no such "
                "token. Use --no-data.begin-of-text, or a tokenizer.json that has one."
            )
        return begin if wanted else None

    def document_row(
        self, split: str, context_len: int, begin: int | None, index: int
    ) -> dict[str, Int32[np.ndarray, "T"]]:
        """Make the training example of one document, arrays [context_len]."""
        tokens, starts = self._whole_documents(split, "documents")
        end = starts[index + 1] if index + 1 < len(starts) else len(tokens)
        return document_row(tokens[starts[index] : end], context_len, begin)

    def _whole_documents(
        self, split: str, sampling: str
    ) -> tuple[Integer[np.ndarray, "N"], Integer[np.ndarray, "D"]]:
        encoded = self._encode(split)
        if encoded.starts is None:
            raise ConfigError(
                f"data.sampling={sampling} needs documents, but {self.name} is one array of "
                "tokens. Use --data.sampling windows, or give the text."
            )
        return encoded.tokens, encoded.starts

    def _encode(self, split: str) -> EncodedSplit:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if split not in self._encoded:
            encoded = self._source.encode(split, self.tokenizer)
            if len(encoded.tokens) < 2:
                raise DataError(
                    f"The {split} split of {self.name} has {len(encoded.tokens)} tokens, expected "
                    "at least 2. Give more data."
                )
            self._encoded[split] = encoded
        return self._encoded[split]


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Open the source and give it its tokenizer.

    Args:
      config: what to read.
      tokenizer: the one saved with a run; None builds the one that the config names.

    Raises:
      DataError, ConfigError, UnknownName, MissingExtra: see `load_source` and `build_tokenizer`.
    """
    source = load_source(config)
    return Corpus(source, tokenizer or source.tokenizer(config.tokenizer))


def batches(
    corpus: Corpus,
    split: str,
    *,
    context_len: int,
    batch_size: int,
    sampling: str,
    seed: int,
    begin_of_text: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Iterate for ever over this process's share of every batch.

    windows: sample i (batch i // batch_size) starts at ``word_i mod (N - context_len)`` of the
    split's N tokens, uniform and with replacement; word_i is the i-th word of the Philox stream
    keyed by seed and split. packed: rows of context_len + 1 tokens, in a new order every epoch.
    documents: the first context_len + 1 tokens of one document per row, padded on the right up to
    context_len always, so that all processes run one program; in a new order every epoch.
    Process p of P takes the samples p, p + P, ... of a batch.

    Differs: the authors of Memory Mosaics draw starts below N - context_len - 2, so that the last
    two windows are never seen; the law is the same for all others. 2Mamba (arXiv 2602.17363) draws
    documents with replacement, pads to the batch's longest document, and leaves one token unscored
    in batches without padding.

    Args:
      corpus: what to draw from.
      split: ``train`` or ``validation``.
      context_len: tokens per sequence.
      batch_size: sequences per batch, all processes together.
      sampling: ``windows``, ``packed`` or ``documents``.
      seed: any whole number; another split gets another stream from the same seed.
      begin_of_text: rows of one document begin with the vocabulary's beginning-of-text token.
      process_index: p, 0 to process_count - 1.
      process_count: P, a divisor of batch_size.

    Returns:
      A grain iterator; ``get_state`` and ``set_state`` read and set the number of the next batch.

    Raises:
      ConfigError: sizes do not divide, or ``sampling`` is unknown or does not fit the source.
      DataError: the split is shorter than one window.
    """
    import grain

    if process_count < 1 or batch_size % process_count or batch_size < 1:
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide into {process_count} processes. "
            f"Use a multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"Process {process_index} of {process_count}: expected 0 or more, below.")
    key = _stream_key(seed, split)
    if sampling == "windows":
        windows = _Windows(corpus, split, context_len, batch_size, key)
        share = functools.partial(windows.batch, first=process_index, step=process_count)
        dataset = grain.MapDataset.range(_ENDLESS).map(share)
    elif sampling in ("packed", "documents"):
        number, row = _rows(corpus, split, sampling, context_len, begin_of_text)
        rows = grain.MapDataset.range(number).seed(key % 2**32).shuffle().repeat()
        # The share is taken from the endless stream: taken from an epoch, it would differ in
        # length between processes, and batches would drift apart.
        dataset = (
            rows[process_index::process_count]
            .map(row)
            .batch(batch_size // process_count, drop_remainder=True)
        )
    else:
        raise ConfigError(f"data.sampling={sampling!r}, expected windows, packed or documents.")
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH))
    )


def _rows(
    corpus: Corpus, split: str, sampling: str, context_len: int, begin_of_text: bool
) -> tuple[int, Callable[[int], Batch]]:
    """Return the number of rows of documents, and what makes one of them."""
    if sampling == "documents":
        begin = corpus.begin(begin_of_text)
        row = functools.partial(corpus.document_row, split, context_len, begin)
        return corpus.num_documents(split), row
    plan = corpus.plan(split, context_len + 1)
    return plan.num_rows, functools.partial(corpus.row, split, plan)


def sequential_batches(
    corpus: Corpus,
    split: str,
    *,
    context_len: int,
    batch_size: int,
    sampling: str = "windows",
    begin_of_text: bool = False,
) -> Iterator[Batch]:
    """Iterate once over a split; all batches have the shape [batch_size, context_len].

    windows: non-overlapping ones, each token but the first is a target once. documents: the rows
    of `batches`, each once and in order. What is left of the last window and the last batch is
    filled up with tokens 0 and targets -1.
    """
    if sampling == "documents":
        number, row = _rows(corpus, split, sampling, context_len, begin_of_text)
        yield from _in_order(number, row, batch_size)
        return
    tokens = corpus.tokens(split)
    span = context_len * batch_size
    for first in range(0, len(tokens) - 1, span):
        piece = _checked(tokens[first : first + span + 1].astype(np.int32), corpus, split)
        inputs = np.zeros(span, np.int32)
        targets = np.full(span, -1, np.int32)
        inputs[: len(piece) - 1] = piece[:-1]
        targets[: len(piece) - 1] = piece[1:]
        shape = (batch_size, context_len)
        yield {"tokens": inputs.reshape(shape), "targets": targets.reshape(shape)}


def _in_order(number: int, row: Callable[[int], Batch], batch_size: int) -> Iterator[Batch]:
    for first in range(0, number, batch_size):
        rows = [row(index) for index in range(first, min(first + batch_size, number))]
        batch = {name: np.stack([one[name] for one in rows]) for name in ("tokens", "targets")}
        missing = ((0, batch_size - len(rows)), (0, 0))
        yield {
            "tokens": np.pad(batch["tokens"], missing),
            "targets": np.pad(batch["targets"], missing, constant_values=-1),
        }


class _Windows:
    """Random access to batches of uniformly random windows."""

    def __init__(self, corpus: Corpus, split: str, context_len: int, batch_size: int, key: int):
        self._corpus, self._split = corpus, split
        self._tokens = corpus.tokens(split)
        self._num_starts = len(self._tokens) - context_len
        if self._num_starts < 1:
            raise DataError(
                f"A window of context_len={context_len} tokens and the one after them does not fit "
                f"the {split} split of {corpus.name}, which has {len(self._tokens)} tokens. "
                f"Use --model.context-len {max(len(self._tokens) - 1, 1)} or less, or more data."
            )
        self._columns = np.arange(context_len + 1)
        self._batch_size, self._key = batch_size, key

    def starts(self, index: int) -> Integer[np.ndarray, "B"]:
        """Return where the windows of a batch start, each in [0, N - context_len)."""
        block, skip = divmod(index * self._batch_size, 4)
        # Philox makes four words per count; the counter gives random access to the stream.
        words = np.random.Philox(key=self._key, counter=block).random_raw(skip + self._batch_size)
        # The modulo favours low starts by num_starts / 2**64, which is nothing.
        return (words[skip:] % np.uint64(self._num_starts)).astype(np.int64)

    def batch(self, index: int, *, first: int, step: int) -> Batch:
        """Read every ``step``-th window of a batch."""
        starts = self.starts(index)[first::step]
        windows = self._tokens[starts[:, None] + self._columns].astype(np.int32)
        windows = _checked(windows, self._corpus, self._split)
        return {"tokens": windows[:, :-1].copy(), "targets": windows[:, 1:].copy()}


def _checked(tokens: np.ndarray, corpus: Corpus, split: str) -> np.ndarray:
    """Refuse ids that the vocabulary lacks: an embedding would read some other row for them."""
    vocab_size = corpus.tokenizer.vocab_size
    if tokens.max() >= vocab_size or tokens.min() < 0:
        found = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise DataError(
            f"The {split} split of {corpus.name} holds the token {found}, but the "
            f"{corpus.tokenizer.kind} vocabulary has ids 0 to {vocab_size - 1}. "
            "Give the --data.tokenizer that the array was made with."
        )
    return tokens


def _stream_key(seed: int, split: str) -> int:
    """128 bits that tell the streams of two seeds or two splits apart."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:16], "little")
