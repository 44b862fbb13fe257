"""Files of JSON strings: splits, stream of tokens, the cache of arrays, and errors."""

import fcntl
import json
import os
import threading

import numpy as np
import pytest

from jaxmem.data import json_lines
from jaxmem.data.config import DataConfig
from jaxmem.data.json_lines import story_tokens
from jaxmem.data.pipeline import batches, load_corpus
from jaxmem.data.shards import read_stories, story_files
from jaxmem.data.sources import load_source
from jaxmem.data.tokenizers import ByteTokenizer, CharTokenizer, build_tokenizer
from jaxmem.errors import DataError

STORIES = ['Once "upon" a time.', "Line\nbreak.", "Über-Öl \u2603", "", "<|endoftext|> is text"]
END = 256 + 1  # of `bpe`: one id per byte, one merge, the end


def write(path, stories):
    path.write_text("".join(json.dumps(s) + "\n" for s in stories), encoding="utf-8")
    return path


def load(path, **fields):
    return load_corpus(DataConfig(path=str(path), **fields))


@pytest.fixture
def bpe(tmp_path):
    """The path of a byte-level BPE with one merge and an end-of-text token."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"in": 256}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("i", "n")])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "bpe" / "tokenizer.json"
    path.parent.mkdir()
    made.save(str(path))
    return path


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "stories"
    made.mkdir()
    write(made / "train.jsonl", STORIES)
    write(made / "valid.jsonl", STORIES[:2])
    return made


@pytest.mark.usefixtures("cache")
def test_stream_is_each_story_and_the_end_of_text(folder, bpe):
    corpus = load(folder, tokenizer=str(bpe))
    decode = corpus.tokenizer.decode
    assert corpus.tokenizer.end_of_text == END
    tokens = corpus.tokens("train")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    documents = corpus.documents("train")
    assert [decode(ids[:-1]) for ids in documents] == STORIES
    assert [int(ids[-1]) for ids in documents] == [END] * 5
    # What looks like the end token in a text is text.
    assert int(np.sum(tokens == END)) == 5
    np.testing.assert_array_equal(np.concatenate(documents), tokens)
    assert [decode(ids[:-1]) for ids in corpus.documents("validation")] == STORIES[:2]
    assert corpus.description == (
        f"auto, folder with train*.jsonl: JSON lines from {folder}; train.jsonl / valid.jsonl"
    )


@pytest.mark.usefixtures("cache")
def test_without_an_end_token_a_newline_ends_each_story(folder):
    assert load(folder, tokenizer="byte").tokens("validation").tobytes().decode("utf-16-le") == (
        "".join(f"{s}\n" for s in STORIES[:2])
    )
    characters = load(folder).tokenizer.characters
    assert characters == "".join(sorted(set("\n".join(STORIES))))


@pytest.mark.usefixtures("cache")
def test_one_file_is_cut_between_stories(tmp_path):
    stories = ["abcd"] * 17 + ["abcdefghijklmnopqrst"] * 3
    corpus = load(write(tmp_path / "all.jsonl", stories), tokenizer="byte")
    train, validation = corpus.documents("train"), corpus.documents("validation")
    # 17 * 5 + 3 * 21 = 148 tokens; nine tenths are 133.2, in the last story but none.
    assert (len(train), len(validation)) == (19, 1)
    assert (len(corpus.tokens("train")), len(corpus.tokens("validation"))) == (127, 21)
    assert bytes(validation[0].tolist()) == b"abcdefghijklmnopqrst\n"
    assert "split between texts" in corpus.description
    two = load(write(tmp_path / "two.jsonl", ["a", "b" * 99]), tokenizer="byte")
    assert [len(two.tokens(split)) for split in ("train", "validation")] == [2, 100]
    two = load(write(tmp_path / "two.jsonl", ["a" * 99, "b"]), tokenizer="byte")
    assert [len(two.tokens(split)) for split in ("train", "validation")] == [100, 2]
    with pytest.raises(DataError, match=r"one text and no validation file.*val\* files"):
        load(write(tmp_path / "one.jsonl", ["a"]), tokenizer="byte").tokens("train")


@pytest.mark.usefixtures("cache")
def test_blocks_and_files_join(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    stories = ["".join(rng.choice(list("abc \n"), n)) for n in rng.integers(0, 60, 90)]
    whole = load(write(tmp_path / "whole.jsonl", stories), tokenizer="byte")
    monkeypatch.setattr(json_lines, "_BLOCK", 100)
    (tmp_path / "parts").mkdir()
    for index, first in enumerate(range(0, 90, 30)):
        write(tmp_path / "parts" / f"train-{index}.ndjson", stories[first : first + 30])
    parts = load(tmp_path / "parts", tokenizer="byte")
    for split in ("train", "validation"):
        np.testing.assert_array_equal(parts.tokens(split), whole.tokens(split))
    tokens, bounds = story_tokens(story_files(tmp_path / "parts")["train"], ByteTokenizer())
    assert len(bounds) == 91
    assert bytes(tokens[bounds[40] : bounds[41]].tolist()).decode().rstrip("\n") == (
        stories[40].rstrip("\n")
    )


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (["traindataset.txt", "valdataset.txt", "testdataset.txt"], ["valdataset.txt"]),
        (["train.txt", "testdataset.txt", "notes.md"], ["testdataset.txt"]),
        (["train.json"], []),
    ],
)
def test_files_of_a_folder_are_found_by_name(tmp_path, names, validation):
    for name in names:
        write(tmp_path / name, ["x"])
    found = story_files(tmp_path)
    assert [f.name for f in found["train"]] == names[:1]
    assert [f.name for f in found["validation"]] == validation
    # Their ending does not tell them from plain text, so `auto` reads them as such.
    load_source(DataConfig(source="jsonl", path=str(tmp_path)))


def test_folder_without_train(tmp_path):
    write(tmp_path / "stories.txt", ["x"])
    config = DataConfig(source="jsonl", path=str(tmp_path))
    with pytest.raises(DataError, match=r"holds no file train\*.*rename"):
        load_source(config)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b'"a"\n\n"b\n', r"bad\.jsonl, line 3 is no JSON \(.*\): '\"b'\. Expected one JSON string"),
        (b"Once upon\n", r"line 1 is no JSON \(Expecting value\): 'Once upon'.*--data.source text"),
        (
            b'"a"\n{"content": "b", "id": 3}\n',
            "line 2 holds a JSON object without 'text'; its fields are 'content', 'id'.*data.field",
        ),
        (b'{"text": null}\n', "line 1: 'text' holds None, expected a string"),
        (b'"a"\n["b"]\n', "line 2 holds a JSON array"),
        (b"null\n", "line 1 holds a JSON null"),
        (b"17\n", "line 1 holds a JSON value, expected a string: '17'"),
        (b'"a"\n"\xe9"\n', "line 2 is no UTF-8: byte 0xe9 at position 1"),
        (b'"a"\n"\\ud800"\n', r"bad\.jsonl, line 2: The text holds '\\ud800'"),
        (b"", r"bad\.jsonl in .*: no text in 0 bytes"),
        (b" \n\n", "no text in 3 bytes"),
    ],
)
def test_bad_files_leave_nothing_behind(tmp_path, cache, lines, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError, match=words):
        load(path, tokenizer="byte").tokens("train")
    assert [p.suffix for p in (cache / "tokens").iterdir()] == [".lock"]


@pytest.mark.usefixtures("cache")
def test_text_outside_the_vocabulary_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl", ["ab", "ba", "abc", "a"])
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .*vocabulary lacks: 'c'"):
        story_tokens([path], CharTokenizer("ab\n"))


@pytest.mark.usefixtures("cache")
def test_long_lines_are_shown_in_part_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'"first"\n' + b"x" * 500)
    stories = read_stories([path])
    assert next(stories).text == "first"
    with pytest.raises(DataError, match=rf": '{'x' * 40}\.\.\.'\. Expected"):
        next(stories)


def test_arrays_are_made_once_and_again_when_something_changes(folder, bpe, cache, monkeypatch):
    calls = []
    original = json_lines._write

    def counted(files, *args):
        calls.append(files[0].name)
        original(files, *args)

    monkeypatch.setattr(json_lines, "_write", counted)
    for _ in range(2):
        corpus = load(folder, tokenizer=str(bpe))
        corpus.tokens("train"), corpus.tokens("validation")
    assert calls == ["train.jsonl", "valid.jsonl"]
    load(folder, tokenizer="byte").tokens("train")
    assert calls[2:] == ["train.jsonl"]
    write(folder / "train.jsonl", ["new"])
    assert bytes(load(folder, tokenizer="byte").tokens("train").tolist()) == b"new\n"
    kept = [p for p in (cache / "tokens").iterdir() if p.is_dir()]
    assert len(kept) == 4


def test_what_a_kill_left_is_neither_used_nor_kept(folder, cache, monkeypatch):
    def dies(files, tokenizer, partial, reading):
        (partial / "tokens.bin").write_bytes(b"ab")
        raise KeyboardInterrupt

    files = story_files(folder)["train"]
    with monkeypatch.context() as patch:
        patch.setattr(json_lines, "_write", dies)
        patch.setattr(json_lines.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            story_tokens(files, ByteTokenizer())
    assert len(list((cache / "tokens").glob(".train-*"))) == 1
    assert len(story_tokens(files, ByteTokenizer()).bounds) == 6
    assert not list((cache / "tokens").glob(".train-*"))


def test_a_second_process_waits_and_takes_what_the_first_has_made(folder, cache):
    files = story_files(folder)["train"]
    made = story_tokens(files, ByteTokenizer())
    (final,) = (p for p in (cache / "tokens").iterdir() if p.is_dir())
    final.rename(final.with_name("away"))
    got = []
    with final.with_name(f"{final.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: got.append(story_tokens(files, ByteTokenizer())))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        final.with_name("away").rename(final)
    second.join(30)
    np.testing.assert_array_equal(got[0].tokens, made.tokens)


def test_damaged_arrays_and_a_folder_that_cannot_be_written(folder, cache, monkeypatch):
    files = story_files(folder)["train"]
    story_tokens(files, ByteTokenizer())
    (final,) = (p for p in (cache / "tokens").iterdir() if p.is_dir())
    os.truncate(final / "tokens.bin", 10)
    with pytest.raises(DataError, match=rf"{final} are damaged. Delete"):
        story_tokens(files, ByteTokenizer())
    blocked = folder / "file"
    blocked.write_text("")
    monkeypatch.setenv("JAXMEM_CACHE", str(blocked))
    with pytest.raises(DataError, match=r"cannot be kept.*JAXMEM_CACHE"):
        story_tokens(files, ByteTokenizer())


def test_slow_preparation_says_how_far_it_is(folder, cache, monkeypatch, capsys):
    monkeypatch.setattr(json_lines, "_SECONDS_BETWEEN_NOTES", 0.0)
    story_tokens(story_files(folder)["train"], ByteTokenizer())
    assert "Tokenising train.jsonl: 5 texts, 69 tokens, about " in capsys.readouterr().err
    assert cache.is_dir()


@pytest.mark.usefixtures("cache")
def test_windows_cross_stories_and_packed_rows_do_not(folder, bpe):
    corpus = load(folder, tokenizer=str(bpe))
    options = {"context_len": 24, "batch_size": 4, "seed": 1}
    windows = next(batches(corpus, "train", sampling="windows", **options))
    assert (windows["targets"] >= 0).all()
    assert any(END in row[:-1] for row in windows["tokens"])
    packed = next(batches(corpus, "train", sampling="packed", **options))
    after_end = packed["tokens"] == END
    assert after_end.any()
    assert (packed["targets"][after_end] == -1).all()


@pytest.mark.usefixtures("cache")
def test_gpt2_vocabulary(folder, corpus_extra):
    corpus = load(folder, tokenizer="gpt2")
    assert corpus.tokens("train")[-1] == 50256
    assert corpus.tokens("train").dtype == np.uint16
    # <|endoftext|> in the text takes several ids, none of which is the end.
    assert int(np.sum(corpus.tokens("train") == 50256)) == 5


@pytest.mark.parametrize("bad", ["tokens.bin", "bounds.npy"])
def test_arrays_without_a_file(folder, cache, bad):
    files = story_files(folder)["train"]
    story_tokens(files, build_tokenizer("byte", ""))
    (final,) = (p for p in (cache / "tokens").iterdir() if p.is_dir())
    (final / bad).unlink()
    with pytest.raises(DataError, match="are damaged"):
        story_tokens(files, ByteTokenizer())
