"""Where text and tokens come from: plays, files, folders, TFDS sets and token arrays.

Text sources are held in memory; token arrays are memory-mapped and never loaded whole, and so are
those made of JSON lines and Parquet.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer

from jaxmem.data._tfds import named_set
from jaxmem.data.config import TFDS_PREFIX, DataConfig
from jaxmem.data.corpus import CORPUS_NAME, corpus_documents
from jaxmem.data.json_lines import divided_tokens, story_tokens
from jaxmem.data.shards import SUFFIXES as SHARD_SUFFIXES
from jaxmem.data.shards import HoldOut, Reading, characters, story_files
from jaxmem.data.stories import made_up_stories
from jaxmem.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from jaxmem.errors import ConfigError, DataError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
TRAIN_SHARE = 0.9
TEXT_SUFFIXES = (".txt", ".md")
TOKEN_SUFFIXES = (".bin", ".npy")


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """The tokens of one split, and where its documents start, if it has any."""

    tokens: Integer[np.ndarray, "N"]
    """All documents, one after the other."""
    starts: Int64[np.ndarray, "D"] | None
    """Position in ``tokens`` of each document's first token; None for plain token arrays."""


@runtime_checkable
class Source(Protocol):
    """Something that gives the tokens of a train and a validation split."""

    @property
    def name(self) -> str:
        """Short name, for run folders and reports."""
        ...

    @property
    def description(self) -> str:
        """One line: what was chosen, why, and how it is split."""
        ...

    def tokenizer(self, spec: str) -> Tokenizer:
        """Build the tokenizer that ``data.tokenizer`` asks for."""
        ...

    def encode(self, split: str, tokenizer: Tokenizer) -> EncodedSplit:
        """Return the tokens of a split."""
        ...


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Documents of text, already split."""

    name: str
    description: str
    splits: Mapping[str, Sequence[str]]
    """Documents of each split."""
    cut: bool
    """Whether the last training document goes on in the validation split."""

    def tokenizer(self, spec: str) -> Tokenizer:
        """Build the tokenizer; characters are taken from both splits, ends of documents included.

        Raises:
          UnknownName, MissingExtra, DataError: see `build_tokenizer`.
        """
        if spec != "char":
            return build_tokenizer(spec, "")
        documents = [text for split in SPLITS for text in self.splits[split]]
        return build_tokenizer(spec, ("\n" if self._several else "").join(documents))

    def encode(self, split: str, tokenizer: Tokenizer) -> EncodedSplit:
        """Encode the documents, each alone, and join them.

        Where there are several, each ends with the tokenizer's end-of-text id; without such an id,
        with a newline if it does not end with one already. A single text gets nothing added, and
        neither does the document that the border between the splits cuts.

        Raises:
          DataError: the text does not fit the vocabulary.
        """
        documents = list(self.splits[split])
        whole = len(documents) - (self.cut and split == "train") if self._several else 0
        pieces = tokenizer.encode_documents(documents[:whole])
        pieces += tokenizer.encode_all(documents[whole:])
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        tokens = np.concatenate(pieces, dtype=tokenizer.dtype, casting="unsafe")
        return EncodedSplit(tokens, np.cumsum(lengths) - lengths)

    @property
    def _several(self) -> bool:
        return any(len(documents) > 1 for documents in self.splits.values())


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """Files of documents, tokenised into the cache; see `jaxmem.data.shards` and `json_lines`."""

    name: str
    description: str
    files: Mapping[str, Sequence[Path]]
    """Files of each split; without validation files the train split is cut between two texts."""
    reading: Reading
    """Where the texts stand, and which of them validate."""

    def tokenizer(self, spec: str) -> Tokenizer:
        """Build the tokenizer; ``char`` reads all files for their characters.

        Raises:
          UnknownName, MissingExtra, DataError: see `build_tokenizer` and `read_stories`.
        """
        everything = [file for split in SPLITS for file in self.files[split]]
        text = characters(everything, self.reading.field) if spec == "char" else ""
        return build_tokenizer(spec, text)

    def encode(self, split: str, tokenizer: Tokenizer) -> EncodedSplit:
        """Map the tokens of a split; every text ends as `Tokenizer.encode_documents` says.

        Raises:
          DataError: see `story_tokens`; or there is one text only, and no validation file; or none
            or all of the texts are held out.
        """
        if self.files["validation"]:
            tokens, bounds = story_tokens(self.files[split], tokenizer, self.reading.field)
            return EncodedSplit(tokens, bounds[:-1])
        found = divided_tokens(self.files["train"], tokenizer, self.reading)
        if self.reading.hold_out is not None:
            _check_sides(
                self.name, self.reading.hold_out, *(len(found[s].bounds) - 1 for s in SPLITS)
            )
            tokens, bounds = found[split]
            return EncodedSplit(tokens, bounds[:-1])
        tokens, bounds = found["train"]
        if len(bounds) < 3:
            raise DataError(
                f"{self.name} holds one text and no validation file, so nothing is left to "
                "validate on. Give more texts, or a folder with train* and val* files."
            )
        # The first text that begins in the last tenth; one at least on either side.
        first = int(np.searchsorted(bounds, TRAIN_SHARE * bounds[-1]))
        first = min(max(first, 1), len(bounds) - 2)
        border = int(bounds[first])
        if split == "train":
            return EncodedSplit(tokens[:border], bounds[:first])
        return EncodedSplit(tokens[border:], bounds[first:-1] - border)


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """Token arrays, already split; usually views of a memory-mapped file."""

    name: str
    description: str
    splits: Mapping[str, Integer[np.ndarray, "N"]]
    meta: Path
    """Where a saved character tokenizer is looked for."""

    def tokenizer(self, spec: str) -> Tokenizer:
        """Build the tokenizer; ``char`` is read from the meta.json beside the array.

        Raises:
          ConfigError: ``char``, and there is no meta.json.
        """
        if spec != "char":
            return build_tokenizer(spec, "")
        if not self.meta.is_file():
            raise ConfigError(
                f"data.tokenizer=char, but {self.name} holds tokens, not text, and there is no "
                f"{self.meta} with its characters. Give --data.tokenizer gpt2 or the path of a "
                'tokenizer.json, or write meta.json: {"kind": "char", "characters": "..."}, '
                "in the order of the ids."
            )
        return load_tokenizer(self.meta)

    def encode(self, split: str, tokenizer: Tokenizer) -> EncodedSplit:
        """Return the array; ids are compared with the vocabulary when batches are read."""
        del tokenizer
        return EncodedSplit(self.splits[split], None)


def load_source(config: DataConfig) -> Source:
    """Open what ``data.source`` and ``data.path`` name.

    Raises:
      ConfigError: the source needs a path and there is none.
      DataError: missing, empty, unreadable or too short.
      MissingExtra: the default corpus is asked for and its extra is not installed.
    """
    kind, reason = config.source, ""
    if kind == "auto":
        kind, reason = _choose(config.path)
    if kind.startswith(TFDS_PREFIX):
        return _tfds_source(kind.removeprefix(TFDS_PREFIX), config)
    hold_out = _hold_out(config)
    if kind == "corpus":
        documents, what = corpus_documents()
        return _text_source(CORPUS_NAME, f"{reason}{what}", documents, hold_out)
    if kind == "stories":
        documents = made_up_stories()
        return _text_source("stories", f"{len(documents):,} made-up stories", documents, hold_out)
    path = _existing(kind, config.path)
    if kind == "tokens":
        if hold_out is not None:
            raise ConfigError(
                f"data.validation_share={hold_out.share} chooses documents, but {path} is one "
                "array of tokens. Leave it at 0, or give the text."
            )
        return _token_source(path, reason)
    if kind in SHARD_SUFFIXES:
        return _shard_source(path, kind, reason, Reading(config.field, hold_out))
    documents = _read_texts(path)
    what = f"{len(documents)} text file{'s' * (len(documents) != 1)} from {path}"
    return _text_source(path.resolve().stem, f"{reason}{what}", documents, hold_out)


def _existing(kind: str, path: str | None) -> Path:
    if path is None:
        raise ConfigError(f"data.source={kind} needs a path, found none. Give --data.path.")
    if not Path(path).exists():
        raise DataError(
            f"data.path={path} does not exist (working folder {os.getcwd()}). "
            "Expected a text file, a folder of text files or a token array. Check the path."
        )
    return Path(path)


def _hold_out(config: DataConfig) -> HoldOut | None:
    share = config.validation_share
    return HoldOut(share, config.validation_seed) if share else None


def split_documents(
    documents: Sequence[str], share: float = TRAIN_SHARE
) -> tuple[list[str], list[str], bool]:
    """Split at position int(share * n) of the n characters of all documents together.

    Returns:
      Training documents, validation documents, and whether the border cut one document in two.
    """
    left = int(share * sum(map(len, documents)))
    for index, text in enumerate(documents):
        if left < len(text):
            head, tail = [text[:left]] * (left > 0), [text[left:]]
            return [*documents[:index], *head], [*tail, *documents[index + 1 :]], left > 0
        left -= len(text)
    return list(documents), [], False


def _choose(path: str | None) -> tuple[str, str]:
    if path is None:
        return "corpus", "auto, no path: "
    if Path(path).suffix in TOKEN_SUFFIXES:
        return "tokens", f"auto, path ends in {Path(path).suffix}: "
    for kind, suffixes in SHARD_SUFFIXES.items():
        for suffix in suffixes:
            if path.endswith(suffix):
                return kind, f"auto, path ends in {suffix}: "
    if (Path(path) / "train.bin").is_file():
        return "tokens", "auto, folder with train.bin: "
    for kind, suffixes in SHARD_SUFFIXES.items():
        if any(file for suffix in suffixes for file in Path(path).glob(f"train*{suffix}")):
            return kind, f"auto, folder with train*.{kind}: "
    return "text", f"auto, {'folder' if Path(path).is_dir() else 'file'} of text: "


def _text_source(
    name: str, description: str, documents: Sequence[str], hold_out: HoldOut | None
) -> TextSource:
    if hold_out is None:
        train, validation, cut = split_documents(documents)
        how = "by characters"
    else:
        sides = [hold_out.takes(text) for text in documents]
        train, validation = (
            [text for text, held in zip(documents, sides, strict=True) if held is side]
            for side in (False, True)
        )
        _check_sides(name, hold_out, len(train), len(validation))
        cut, how = False, f"by documents, {hold_out.share:g} by hash, in characters"
    if not train or not validation:
        raise DataError(
            f"{name} has {sum(map(len, documents))} characters, too few to split them "
            f"{TRAIN_SHARE:.0%} / {1 - TRAIN_SHARE:.0%}. Give a longer text."
        )
    sizes = [sum(map(len, split)) for split in (train, validation)]
    description += f"; split {how} {sizes[0]:,} / {sizes[1]:,}"
    return TextSource(name, description, {"train": train, "validation": validation}, cut)


def _check_sides(name: str, hold_out: HoldOut, train: int, validation: int) -> None:
    """Refuse a choice by hash that leaves one split empty."""
    if not train or not validation:
        raise DataError(
            f"Of the {train + validation} documents of {name}, {validation} fall into the share "
            f"data.validation_share={hold_out.share:g} that is kept for validation; expected some "
            "in both splits. Give another share or --data.validation-seed, or 0 for the last tenth."
        )


def _tfds_source(name: str, config: DataConfig) -> TextSource:
    texts = named_set(name, config.path, config.field)
    short = name.split("/")[0].split(":")[0]
    if "validation" not in texts:
        what = f"tfds:{name}, which has no validation split"
        return _text_source(short, what, texts["train"], _hold_out(config))
    sizes = [sum(map(len, texts[split])) for split in SPLITS]
    if not all(sizes):
        raise DataError(
            f"tfds:{name} has {sizes[0]} characters in train and {sizes[1]} in validation; "
            "expected some in both. Prepare it again."
        )
    description = f"tfds:{name}; its own splits, {sizes[0]:,} / {sizes[1]:,} characters"
    return TextSource(short, description, {split: texts[split] for split in SPLITS}, False)


def _read_texts(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()
        )
        if not files:
            raise DataError(
                f"The folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file (subfolders "
                "included). Expected at least one. Check the path, or rename the files."
            )
    else:
        files = [path]
    return [_read_text(file) for file in files]


def _read_text(path: Path) -> str:
    """Read a file as UTF-8, line ends as they are, without a byte order mark."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError(
            f"{path} is empty or blank ({len(data)} bytes), expected text. Fill or remove it."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8: byte 0x{data[error.start]:02x} at position {error.start}. "
            "Expected UTF-8 text. Convert it, for example with "
            f"iconv -f ISO-8859-1 -t UTF-8, or use --data.source tokens for an array of tokens."
        ) from None


def _shard_source(path: Path, kind: str, reason: str, reading: Reading) -> ShardSource:
    files = story_files(path, kind)
    if files["validation"]:
        how = " / ".join(_listed(files[split]) for split in SPLITS)
    elif reading.hold_out is None:
        how = f"{_listed(files['train'])}, split between texts"
    else:
        how = f"{_listed(files['train'])}, {reading.hold_out.share:g} by hash for validation"
    what = {"jsonl": "JSON lines", "parquet": "Parquet"}[kind]
    return ShardSource(path.resolve().stem, f"{reason}{what} from {path}; {how}", files, reading)


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    return (
        ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]} ({len(names)} files)"
    )


def _token_source(path: Path, reason: str) -> TokenSource:
    if path.is_dir():
        train, validation = path / "train.bin", path / "val.bin"
        if not train.is_file():
            raise DataError(
                f"The folder {path} holds no train.bin, expected token arrays train.bin and "
                "val.bin. Give the folder or file that has the tokens."
            )
        if validation.is_file():
            arrays = {"train": _map_tokens(train), "validation": _map_tokens(validation)}
            how = "train.bin / val.bin"
        else:
            arrays, how = _split_tokens(_map_tokens(train)), "train.bin split by position"
        meta = path / "meta.json"
    else:
        arrays, how = _split_tokens(_map_tokens(path)), "split by position"
        meta = path.with_name("meta.json")
    sizes = " / ".join(f"{len(arrays[split]):,}" for split in SPLITS)
    return TokenSource(
        path.resolve().stem, f"{reason}tokens from {path}; {how}, {sizes}", arrays, meta
    )


def _split_tokens(tokens: np.ndarray) -> dict[str, np.ndarray]:
    border = int(TRAIN_SHARE * len(tokens))
    return {"train": tokens[:border], "validation": tokens[border:]}


def _map_tokens(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(
                f"{path} ({size} bytes) is no .npy array: {error}. Write it with numpy.save."
            ) from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{path} holds a {tokens.dtype} array of shape {tokens.shape}, expected whole "
                "numbers in one dimension. Save the ids of the tokens one after the other."
            )
        return tokens
    if size == 0 or size % 2:
        raise DataError(
            f"{path} has {size} bytes, expected a positive even number (uint16 tokens, little "
            "endian). Write it with numpy.ndarray.tofile, or save other types as .npy."
        )
    return np.memmap(path, dtype="<u2", mode="r")
