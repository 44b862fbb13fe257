"""Batches: content, order, position, and errors."""

import itertools
import json

import numpy as np
import pytest

from jaxmem.data.config import DataConfig
from jaxmem.data.packing import document_row
from jaxmem.data.pipeline import Corpus, batches, load_corpus, sequential_batches
from jaxmem.data.tokenizers import CharTokenizer
from jaxmem.errors import ConfigError, DataError, UnknownName

STREAM = [36656, 13052, 2855, 4951, 24415, 3714]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of different lengths, in which each token tells its place."""
    folder = tmp_path_factory.mktemp("corpus")
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    border = 0
    for index, length in enumerate([40, 3, 90, 1, 17, 150, 60, 39]):
        (folder / f"{index}.txt").write_text(letters[border : border + length], encoding="utf-8")
        border += length
    return load_corpus(DataConfig(path=str(folder)))


def start(corpus, sampling="windows", **changes):
    options = {"context_len": 16, "batch_size": 6, "sampling": sampling, "seed": 3} | changes
    return batches(corpus, options.pop("split", "train"), **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_windows_are_neighbouring_tokens(corpus):
    tokens = corpus.tokens("train").astype(np.int32)
    for batch in take(start(corpus), 5):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "tokens": ((6, 16), np.int32),
            "targets": ((6, 16), np.int32),
        }
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        for row, target in zip(batch["tokens"], batch["targets"], strict=True):
            places = np.flatnonzero(tokens[:-16] == row[0])
            assert any(
                (tokens[s : s + 16] == row).all() and tokens[s + 16] == target[-1] for s in places
            )


def test_window_starts_are_uniform_and_reach_both_ends(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(111, dtype=np.uint16).tofile(path)  # 99 training tokens, so 95 starts
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="byte"))
    iterator = start(corpus, context_len=4, batch_size=950)
    counts = np.bincount(np.concatenate([b["tokens"][:, 0] for b in take(iterator, 10)]))
    assert len(counts) == 95
    # 100 per start are expected; five standard deviations are 50.
    assert counts.min() > 50
    assert counts.max() < 150


def test_the_stream_of_windows_never_changes(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(60_000))
    vocabulary = CharTokenizer("".join(map(chr, range(60_000))))
    corpus = load_corpus(DataConfig(path=str(path)), vocabulary)
    found = take(start(corpus, context_len=2, batch_size=3, seed=1337), 2)
    # Computed with whole numbers from the docstring of `batches`; other numbers are other runs.
    assert np.concatenate([b["tokens"][:, 0] for b in found]).tolist() == STREAM


@pytest.mark.parametrize("sampling", ["windows", "packed", "documents"])
def test_same_seed_same_batches_and_others_differ(corpus, sampling):
    first = take(start(corpus, sampling), 4)
    assert_same(first, take(start(corpus, sampling), 4))
    other = take(start(corpus, sampling, seed=4), 4)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


def test_splits_have_different_streams(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(250, dtype=np.uint16).tofile(tmp_path / name)
    corpus = load_corpus(DataConfig(path=str(tmp_path), tokenizer="byte"))
    train, validation = (next(start(corpus, split=s)) for s in ("train", "validation"))
    assert (train["tokens"] != validation["tokens"]).any()


@pytest.mark.parametrize("sampling", ["windows", "packed", "documents"])
def test_set_state_continues_identically(corpus, sampling):
    iterator = start(corpus, sampling)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    fresh = start(corpus, sampling)
    fresh.set_state(state)
    assert_same(take(fresh, 5), expected)
    iterator.set_state(state)
    assert_same(take(iterator, 5), expected)


@pytest.mark.parametrize("sampling", ["windows", "packed", "documents"])
def test_state_holds_for_another_number_of_processes(corpus, sampling):
    alone = start(corpus, sampling)
    take(alone, 5)
    state = alone.get_state()
    expected = next(alone)["tokens"]
    shares = []
    for process in range(3):
        share = start(corpus, sampling, process_index=process, process_count=3)
        share.set_state(state)
        shares.append(next(share)["tokens"])
    assert sorted(map(tuple, np.concatenate(shares))) == sorted(map(tuple, expected))


def test_packed_batches_pass_each_row_once_per_epoch(corpus):
    rows = corpus.plan("train", 17).num_rows
    assert rows % 6
    batch = take(start(corpus, "packed", batch_size=1), 2 * rows)
    assert set(batch[0]) == {"tokens", "targets", "segment_ids"}
    seen = [tuple(b["tokens"][0]) for b in batch]
    assert sorted(seen[:rows]) == sorted(seen[rows:])
    assert len(set(seen[:rows])) == rows
    assert seen[:rows] != seen[rows:]


class WithBothEnds(CharTokenizer):
    """A vocabulary with tokens before and after a document."""

    begin_of_text, end_of_text = 400, 401
    vocab_size = 402


def test_a_row_holds_the_beginning_of_one_document(corpus):
    both = Corpus(corpus._source, WithBothEnds(corpus.tokenizer.characters))
    documents = both.documents("train")
    count = len(documents)
    for begin in (False, True):
        batch = take(start(both, "documents", batch_size=1, begin_of_text=begin), 2 * count)
        rows = [{name: value[0] for name, value in b.items()} for b in batch]
        head = [400] * begin
        expected = [[*head, *ids.tolist()][:17] for ids in documents]
        found = []
        for row in rows:
            scored = row["targets"] >= 0
            # Scored tokens stand on the left, and those that are not are padding.
            assert not scored[scored.sum() :].any()
            np.testing.assert_array_equal(row["segment_ids"], scored)
            assert not row["tokens"][~scored].any()
            np.testing.assert_array_equal(
                row["tokens"][1:][scored[1:]], row["targets"][:-1][scored[1:]]
            )
            found.append([*row["tokens"][scored].tolist(), int(row["targets"][scored][-1])])
        assert sorted(found[:count]) == sorted(found[count:]) == sorted(expected)
        assert found[:count] != found[count:]
    short = next(row for row in rows if 0 < (row["targets"] >= 0).sum() < 16)
    assert (short["targets"] == 401).sum() == 1  # the end is learnt, and never read
    assert 401 not in short["tokens"]


def test_an_empty_document_is_a_row_of_padding():
    row = document_row(np.array([7]), 4, None)
    assert [row[name].tolist() for name in ("tokens", "targets", "segment_ids")] == [
        [0] * 4,
        [-1] * 4,
        [0] * 4,
    ]
    row = document_row(np.array([7]), 4, 5)
    assert (row["tokens"].tolist(), row["targets"].tolist()) == ([5, 0, 0, 0], [7, -1, -1, -1])


def test_a_vocabulary_without_a_beginning_is_refused(corpus):
    with pytest.raises(ConfigError, match=r"char vocabulary has no.*--no-data\.begin-of-text"):
        start(corpus, "documents", begin_of_text=True)


def test_packing_needs_documents(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="byte"))
    for sampling in ("packed", "documents"):
        with pytest.raises(ConfigError, match=f"{sampling} needs documents"):
            start(corpus, sampling)


def test_window_longer_than_the_split(corpus):
    length = len(corpus.tokens("validation"))
    with pytest.raises(
        DataError, match=rf"context_len={length}.*{length} tokens.*--model.context-len {length - 1}"
    ):
        start(corpus, split="validation", context_len=length)
    batch = next(start(corpus, split="validation", context_len=length - 1))
    assert (batch["tokens"] == corpus.tokens("validation")[:-1]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process_count": 4}, "multiple of 4"),
        ({"process_count": 2, "process_index": 2}, "Process 2 of 2"),
        ({"sampling": "random"}, "windows, packed or documents"),
    ],
)
def test_impossible_batches(corpus, changes, words):
    with pytest.raises(ConfigError, match=words):
        start(corpus, **changes)


def test_misspelt_split(corpus):
    with pytest.raises(UnknownName, match="validation"):
        start(corpus, split="valid")


def test_token_outside_the_vocabulary(tmp_path):
    path = tmp_path / "ids.bin"
    np.full(100, 300, np.uint16).tofile(path)
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="byte"))
    with pytest.raises(DataError, match=r"token 300.*ids 0 to 255.*--data\.tokenizer"):
        next(start(corpus))
    with pytest.raises(DataError, match="token 300"):
        next(sequential_batches(corpus, "train", context_len=8, batch_size=2))


@pytest.mark.parametrize("context_len", [1, 7, 64, 1000])
def test_sequential_batches_score_every_token_once(corpus, context_len):
    tokens = corpus.tokens("train")
    found = list(sequential_batches(corpus, "train", context_len=context_len, batch_size=3))
    inputs = np.concatenate([batch["tokens"].reshape(-1) for batch in found])
    targets = np.concatenate([batch["targets"].reshape(-1) for batch in found])
    assert {batch["tokens"].shape for batch in found} == {(3, context_len)}
    scored = targets >= 0
    np.testing.assert_array_equal(targets[scored], tokens[1:])
    np.testing.assert_array_equal(inputs[scored], tokens[:-1])
    assert not inputs[~scored].any()


@pytest.mark.parametrize("begin", [False, True])
def test_sequential_documents_are_the_rows_of_training_once(corpus, begin):
    both = Corpus(corpus._source, WithBothEnds(corpus.tokenizer.characters))
    options = {"sampling": "documents", "begin_of_text": begin}
    found = list(sequential_batches(both, "train", context_len=16, batch_size=5, **options))
    count = len(both.documents("train"))
    assert count % 5  # the last batch is not full
    names = ("tokens", "targets")
    rows = [tuple(b[name][i].tolist() for name in names) for b in found for i in range(5)]
    drawn = take(start(both, "documents", batch_size=1, begin_of_text=begin), count)
    trained = [tuple(b[name][0].tolist() for name in names) for b in drawn]
    assert sorted(rows[:count]) == sorted(trained)
    assert rows[count:] == [([0] * 16, [-1] * 16)] * (len(rows) - count)
