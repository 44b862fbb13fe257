"""Files, folders and token arrays."""

import json

import numpy as np
import pytest

from jaxmem.data.config import DataConfig
from jaxmem.data.pipeline import load_corpus
from jaxmem.data.sources import load_source, split_documents
from jaxmem.data.tokenizers import ByteTokenizer, CharTokenizer, save_tokenizer
from jaxmem.errors import ConfigError, DataError

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def write_text(path, length):
    text = (ALPHABET * (length // len(ALPHABET) + 1))[:length]
    path.write_text(text, encoding="utf-8", newline="")
    return text


def test_text_file_of_tiny_shakespeare_size(tmp_path):
    path = tmp_path / "tiny.txt"
    text = write_text(path, 1_115_394)
    corpus = load_corpus(DataConfig(path=str(path)))
    train, validation = corpus.tokens("train"), corpus.tokens("validation")
    assert (corpus.tokenizer.vocab_size, corpus.name) == (65, "tiny")
    assert (len(train), len(validation)) == (1_003_854, 111_540)
    assert train.dtype == np.uint16
    assert corpus.tokenizer.decode(np.concatenate((train, validation))) == text
    assert len(corpus.documents("train")) == len(corpus.documents("validation")) == 1
    assert corpus.description.startswith("auto, file of text: ")
    assert "1,003,854 / 111,540" in corpus.description


def test_split_documents_counts_characters_of_all_documents():
    assert split_documents(["abcdefghij"]) == (["abcdefghi"], ["j"], True)
    assert split_documents(["abcdefghi", "j"]) == (["abcdefghi"], ["j"], False)
    assert split_documents(["ab", "cdefghijkl", "m", "n"], 0.5) == (
        ["ab", "cdefg"],
        ["hijkl", "m", "n"],
        True,
    )


def test_folder_of_documents(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("second\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("12345 " * 3)
    (tmp_path / "notes.rst").write_text("not read")
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    decode = corpus.tokenizer.decode
    # A newline ends the documents that lack one, but not the one that the border cuts.
    assert [decode(ids) for ids in corpus.documents("train")] == [
        "first\n",
        "second\n",
        "12345 12345 123",
    ]
    assert decode(corpus.tokens("validation")) == "45 \n"
    np.testing.assert_array_equal(np.concatenate(corpus.documents("train")), corpus.tokens("train"))


def test_end_of_text_ends_whole_documents(tmp_path):
    class WithEnd(ByteTokenizer):
        vocab_size = 257
        end_of_text = 256

    (tmp_path / "a.txt").write_text("aaaa")
    (tmp_path / "b.txt").write_text("bbbb")
    corpus = load_corpus(DataConfig(path=str(tmp_path)), WithEnd())
    assert corpus.tokens("train").tolist() == [*b"aaaa", 256, *b"bbb"]
    assert corpus.tokens("validation").tolist() == [*b"b", 256]


def test_line_ends_stay_and_the_byte_order_mark_goes(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n" + b"c" * 10)
    corpus = load_corpus(DataConfig(path=str(path)))
    assert corpus.tokenizer.characters == "\n\rabc"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"bad\.txt is empty or blank \(0 bytes\)"),
        (b" \n\n", r"blank \(3 bytes\)"),
        (b"na\xefve art", r"bad\.txt is no UTF-8: byte 0xef at position 2.*iconv"),
        (b"a", "1 characters, too few"),
    ],
)
def test_bad_text_files(tmp_path, content, words):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_source(DataConfig(path=str(path)))


def test_split_of_a_single_token(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ab")
    corpus = load_corpus(DataConfig(path=str(path)))
    with pytest.raises(DataError, match=r"validation split of short has 1 tokens.*at least 2"):
        corpus.tokens("validation")


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        load_source(DataConfig(path=str(tmp_path / "absent.txt")))
    with pytest.raises(DataError, match=r"no \.txt or \.md file"):
        load_source(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("source", ["text", "jsonl", "tokens"])
def test_sources_that_need_a_path(source):
    with pytest.raises(ConfigError, match=rf"data\.source={source} needs a path.*--data\.path"):
        load_source(DataConfig(source=source))


def test_bin_file_is_mapped_and_split_by_position(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="byte"))
    assert isinstance(corpus.tokens("train"), np.memmap)
    np.testing.assert_array_equal(corpus.tokens("train"), np.arange(90))
    np.testing.assert_array_equal(corpus.tokens("validation"), np.arange(90, 100))
    assert corpus.documents("train") is None
    assert "path ends in .bin" in corpus.description


def test_folder_of_train_and_val(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(7, dtype=np.uint16).tofile(tmp_path / "val.bin")
    corpus = load_corpus(DataConfig(path=str(tmp_path), tokenizer="byte"))
    assert (len(corpus.tokens("train")), len(corpus.tokens("validation"))) == (50, 7)
    assert "train.bin / val.bin, 50 / 7" in corpus.description
    (tmp_path / "val.bin").unlink()
    corpus = load_corpus(DataConfig(path=str(tmp_path), tokenizer="byte"))
    assert (len(corpus.tokens("train")), len(corpus.tokens("validation"))) == (45, 5)


def test_npy_array(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(20, dtype=np.int64))
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="byte"))
    np.testing.assert_array_equal(corpus.tokens("validation"), [18, 19])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.bin", b"", "0 bytes, expected a positive even number"),
        ("a.bin", b"abc", "3 bytes"),
        ("a.npy", b"abc", r"no \.npy array"),
        ("a.npy", np.zeros((2, 2), np.int32), r"int32 array of shape \(2, 2\)"),
        ("a.npy", np.zeros(4), "float64 array"),
        ("a.npy", np.array([{}], dtype=object), r"no \.npy array"),
    ],
)
def test_bad_token_arrays(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DataError, match=words):
        load_source(DataConfig(path=str(path)))


def test_tokens_folder_without_train(tmp_path):
    with pytest.raises(DataError, match=r"no train\.bin"):
        load_source(DataConfig(source="tokens", path=str(tmp_path)))


def test_characters_of_a_token_array_come_from_meta_json(tmp_path):
    path = tmp_path / "ids.bin"
    np.tile(np.arange(3, dtype=np.uint16), 10).tofile(path)
    with pytest.raises(ConfigError, match=r"meta\.json.*characters") as caught:
        load_corpus(DataConfig(path=str(path)))
    assert "--data.tokenizer gpt2" in str(caught.value)
    save_tokenizer(CharTokenizer("xyz"), tmp_path / "meta.json")
    assert load_corpus(DataConfig(path=str(path))).tokenizer.characters == "xyz"
    (tmp_path / "meta.json").write_text(json.dumps({"stoi": {}}))
    with pytest.raises(DataError, match="stoi"):
        load_corpus(DataConfig(path=str(path)))


def test_saved_tokenizer_is_used_instead_of_a_new_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abab" * 10)
    saved = CharTokenizer("cba")
    corpus = load_corpus(DataConfig(path=str(path)), saved)
    assert corpus.tokenizer is saved
    assert corpus.tokens("train")[:2].tolist() == [2, 1]
    with pytest.raises(DataError, match="vocabulary lacks: 'b'"):
        load_corpus(DataConfig(path=str(path)), CharTokenizer("ca")).tokens("train")
