"""Shards of documents: forms, order, the texts that are held out, and damaged files."""

import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxmem.data import json_lines
from jaxmem.data.config import DataConfig
from jaxmem.data.pipeline import batches, load_corpus
from jaxmem.data.shards import HoldOut, read_stories, story_files
from jaxmem.errors import DataError, MissingExtra

TEXTS = [f"Document {number}: " + "xyz é\n"[number % 5 :] * (number % 7) for number in range(200)]

# Those of the share 0.05 with the seed 123.
HELD = [22, 37, 87, 107, 129, 157, 162, 170, 189]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": n, field: t}) + "\n" for n, t in enumerate(texts)).encode()


def write(path, texts, field="text"):
    """Write a shard in the form that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), field: texts})
        parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines(texts, field))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(texts, field)))
    else:
        path.write_bytes(lines(texts, field))
    return path


def texts_of(corpus, split):
    return [bytes(ids[:-1].tolist()).decode() for ids in corpus.documents(split)]


def load(path, **fields):
    return load_corpus(DataConfig(path=str(path), tokenizer="byte", **fields))


FORMS = ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, form):
    path = write(tmp_path / f"a.{form}", TEXTS[:20])
    stories = list(read_stories([path]))
    assert [story.text for story in stories] == TEXTS[:20]
    assert [story.line for story in stories] == list(range(1, 21))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_recognised_and_tokenised(tmp_path, form):
    corpus = load(write(tmp_path / f"a.{form}", TEXTS, "content"), field="content")
    found = texts_of(corpus, "train") + texts_of(corpus, "validation")
    assert [t.rstrip("\n") for t in found] == [t.rstrip("\n") for t in TEXTS]
    assert corpus.description.startswith(f"auto, path ends in .{form}: ")
    assert isinstance(corpus.tokens("train"), np.memmap)


def test_hashes_never_change():
    held = [n for n in range(200) if HoldOut(0.05, 123).takes(TEXTS[n])]
    # Another choice would put texts that a model was trained on among those that test it.
    assert held == HELD
    other = [n for n in range(200) if HoldOut(0.05, 124).takes(TEXTS[n])]
    assert held != other
    assert set(held) < {n for n in range(200) if HoldOut(0.3, 123).takes(TEXTS[n])}


def test_the_share_is_kept():
    held = sum(HoldOut(0.1, 7).takes(str(n)) for n in range(10_000))
    assert abs(held - 1000) < 5 * 30  # five standard deviations


@pytest.mark.usefixtures("cache")
def test_the_side_of_a_document_does_not_depend_on_shards(tmp_path):
    options = {"validation_share": 0.05}
    one = load(write(tmp_path / "one.jsonl", TEXTS), **options)
    for number, first in enumerate(range(0, 200, 30)):
        write(tmp_path / "many" / "sub" / f"{number}.jsonl.gz", TEXTS[first : first + 30])
    many = load(tmp_path / "many", source="jsonl", **options)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(one.tokens(split), many.tokens(split))
        np.testing.assert_array_equal(
            np.concatenate(one.documents(split)), np.concatenate(many.documents(split))
        )
    assert len(one.documents("validation")) == len(HELD)
    assert len(one.documents("train")) == 200 - len(HELD)
    backwards = load(write(tmp_path / "back.jsonl", TEXTS[::-1]), **options)
    assert sorted(texts_of(backwards, "validation")) == sorted(texts_of(one, "validation"))
    assert "0.05 by hash for validation" in one.description
    assert "0.jsonl.gz to 6.jsonl.gz (7 files)" in many.description


@pytest.mark.usefixtures("cache")
def test_a_validation_split_of_its_own_is_used(tmp_path):
    for split, some in (("train", TEXTS[:50]), ("validation", TEXTS[50:60]), ("test", TEXTS[60:])):
        for chunk in (1, 2):
            write(tmp_path / split / f"chunk{chunk}" / "0.jsonl.zst", some[chunk - 1 :: 2])
    corpus = load(tmp_path, source="jsonl", validation_share=0.3)
    strip = [text.rstrip("\n") for text in TEXTS]
    found = {s: [t.rstrip("\n") for t in texts_of(corpus, s)] for s in ("train", "validation")}
    assert found == {
        "train": strip[:50:2] + strip[1:50:2],
        "validation": strip[50:60:2] + strip[51:60:2],
    }


def test_files_of_a_folder(tmp_path):
    names = ["data/b.parquet", "a.parquet", "notes.txt", "val/c.parquet", "x.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = story_files(tmp_path, "parquet")
    assert found["train"] == [tmp_path / "a.parquet", tmp_path / "data" / "b.parquet"]
    assert found["validation"] == [tmp_path / "val" / "c.parquet"]
    assert story_files(tmp_path)["train"] == [tmp_path / "x.jsonl"]
    write(tmp_path / "more" / "train-0.parquet", ["a"])
    config = DataConfig(path=str(tmp_path / "more"), tokenizer="byte")
    assert load_corpus(config).description.startswith("auto, folder with train*.parquet: Parquet")


@pytest.mark.usefixtures("cache")
def test_rows_of_documents_resume(tmp_path):
    corpus = load(write(tmp_path / "a.jsonl.gz", TEXTS), validation_share=0.05)
    options = {"context_len": 12, "batch_size": 4, "sampling": "documents", "seed": 1}
    first = batches(corpus, "train", **options)
    for _ in range(3):
        next(first)
    again = batches(corpus, "train", **options)
    again.set_state(first.get_state())
    for _ in range(3):
        np.testing.assert_equal(next(first), next(again))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("share", [1e-6, 1.0 - 1e-6])
def test_an_empty_side_is_refused(tmp_path, share):
    corpus = load(write(tmp_path / "a.jsonl", TEXTS), validation_share=share)
    with pytest.raises(DataError, match=r"Of the 200 documents of a, \d+ fall.*validation-seed"):
        corpus.tokens("train")


def test_an_empty_side_of_plain_texts_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(DataError, match=r"Of the 1 documents of a, 0 fall"):
        load(tmp_path / "a.txt", validation_share=0.001)


@pytest.mark.usefixtures("cache")
def test_tokens_cannot_be_held_out(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"validation_share=0\.5.*one array of tokens"):
        load(tmp_path / "a.bin", validation_share=0.5)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: .*gzip"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-20], "cannot be read: .*Fetch it again"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst cannot be read: .*ZSTD"),
        ("a.parquet", b"no table", "a.parquet is no Parquet file, or damaged"),
    ],
    ids=["gzip", "cut", "zstd", "parquet"],
)
def test_damaged_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(tmp_path / name).tokens("train")


def test_tables_without_text(tmp_path):
    path = write(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(DataError, match=r"no column 'body', but 'id', 'text'.*--data\.field"):
        next(read_stories([path], "body"))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' holds None, expected a text"):
        list(read_stories([path]))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_it_says_what_to_do(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=rf"{name} is read by.*pip install pyarrow.*\.jsonl\.gz"):
        next(read_stories([path]))


@pytest.mark.usefixtures("cache")
def test_progress_counts_compressed_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_lines, "_SECONDS_BETWEEN_NOTES", 0.0)
    load(write(tmp_path / "a.jsonl.gz", ["b", "c"])).tokens("train")
    assert "2 texts, 4 tokens, file 1 of 1" in capsys.readouterr().err
