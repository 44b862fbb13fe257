"""Files with one JSON string per line: read as a stream, tokenised once, then memory-mapped.

Token arrays are kept in the folder of `jaxmem.cache.cache_dir`, under a name that depends on the
files (place, size, time of the last change) and on the tokenizer. Neither the files nor the tokens
are ever in memory as a whole.

Reference: BabiStories (Memory Mosaics, arXiv 2405.06394, sec. 6), whose stories come in this form.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from jaxmem.cache import cache_dir
from jaxmem.data.tokenizers import Tokenizer
from jaxmem.errors import DataError

SUFFIXES = (".jsonl", ".ndjson")
"""Endings that say by themselves that a file holds JSON lines."""
_FOLDER_SUFFIXES = (*SUFFIXES, ".json", ".txt")
_PREFIXES = {"train": ("train",), "validation": ("val", "test")}

# Counts the changes of the arrays' layout; part of the folder's name.
_FORMAT = 1
_TOKENS, _BOUNDS = "tokens.bin", "bounds.npy"
# Characters that are tokenised at once, on all cores; a batch takes some ten times as many bytes.
_BLOCK = 2**22
_SECONDS_BETWEEN_NOTES = 10.0


class Story(NamedTuple):
    """One text and where it stands."""

    text: str
    path: Path
    line: int


class StoryTokens(NamedTuple):
    """The tokens of some files, as views of memory-mapped arrays."""

    tokens: Integer[np.ndarray, "N"]
    """All stories, one after the other."""
    bounds: Int64[np.ndarray, "E"]
    """Story d holds the tokens bounds[d] to bounds[d + 1] - 1; one more entry than stories."""


def story_files(path: Path) -> dict[str, list[Path]]:
    """Find the files of both splits.

    A file is the train split. In a folder these are the files whose names begin with ``train``,
    and for the validation split ``val``, or if there is none ``test``; several are read in the
    order of their names. The validation split may have no file.

    Raises:
      DataError: the folder has no train file.
    """
    if not path.is_dir():
        return {"train": [path], "validation": []}
    files = sorted(f for f in path.iterdir() if f.suffix in _FOLDER_SUFFIXES and f.is_file())
    found: dict[str, list[Path]] = {}
    for split, prefixes in _PREFIXES.items():
        by_prefix = ([f for f in files if f.name.startswith(prefix)] for prefix in prefixes)
        found[split] = next(filter(None, by_prefix), [])
    if not found["train"]:
        raise DataError(
            f"The folder {path} holds no file train*{'|'.join(_FOLDER_SUFFIXES)}. Expected one "
            "JSON string per line in such a file, and validation texts in val* or test*. "
            "Check the path, or rename the files."
        )
    return found


def read_stories(files: Iterable[Path]) -> Iterator[Story]:
    """Read the strings one by one; blank lines are skipped.

    Raises:
      DataError: a line is no UTF-8, no JSON, or no string; the message names file and line.
    """
    for path in files:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield Story(_parse(line, f"{path}, line {number}"), path, number)


def characters(files: Iterable[Path]) -> str:
    """Return the distinct characters of the stories and of the newlines between them."""
    return "".join(set("\n").union(*(story.text for story in read_stories(files))))


def story_tokens(files: Sequence[Path], tokenizer: Tokenizer) -> StoryTokens:
    """Return the tokens of all stories, each with its end; tokenise them if that was not done yet.

    Processes that ask at once wait for the first one. A kill leaves nothing that is taken for
    complete, and what it leaves is removed by the next call.

    Raises:
      DataError: see `read_stories`; a text does not fit the vocabulary; there is no story; or the
        cache folder cannot be written or is damaged.
    """
    folder = cache_dir() / "tokens" / _name(files, tokenizer)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _prepare(files, tokenizer, folder)
        return _open(folder, tokenizer)
    except OSError as error:
        raise DataError(
            f"The tokens of {_names(files)} cannot be kept in {folder.parent}: {error}. "
            "Make room, or set JAXMEM_CACHE to a folder that can be written."
        ) from error


def _parse(line: bytes, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is no UTF-8: byte 0x{line[error.start]:02x} at position {error.start}. "
            "Expected JSON in UTF-8. Convert the file."
        ) from None
    except ValueError as error:
        what = getattr(error, "msg", error)
        raise DataError(
            f"{where} is no JSON ({what}): {_short(line)}. Expected one JSON string per line, such "
            'as "Once upon a time". Mend or remove the line; --data.source text reads plain text.'
        ) from None
    if not isinstance(value, str):
        kind = {dict: "object", list: "array", type(None): "null"}.get(type(value), "value")
        raise DataError(
            f"{where} holds a JSON {kind}, expected a string: {_short(line)}. "
            "Write each text as one JSON string on a line of its own."
        )
    return value


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _names(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more files"


def _name(files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Name the folder of the arrays after all that they depend on."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = json.dumps([_FORMAT, tokenizer.fingerprint, facts])
    return f"{files[0].stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _open(folder: Path, tokenizer: Tokenizer) -> StoryTokens:
    """Map the arrays, after a look whether they belong together."""
    try:
        bounds = np.load(folder / _BOUNDS, mmap_mode="r", allow_pickle=False)
        tokens = np.memmap(folder / _TOKENS, dtype=tokenizer.dtype, mode="r")
        whole = len(tokens) == bounds[-1]
    except (ValueError, EOFError, FileNotFoundError):
        whole = False
    if not whole:
        raise DataError(
            f"The token arrays in {folder} are damaged. Delete that folder; the next run makes "
            "them again."
        )
    return StoryTokens(tokens, bounds)


def _prepare(files: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the arrays beside ``folder`` and rename the result into place, which is atomic."""
    with _turn(folder.with_name(f"{folder.name}.lock")) as alone:
        if folder.is_dir():  # another process has made it meanwhile
            return
        if alone:
            for left in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(files, tokenizer, partial)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Wait for the lock of a file and hold it; False where the file system has no locks."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _write(files: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> None:
    lengths = [np.zeros(1, np.int64)]
    progress = _Progress(files)
    with (folder / _TOKENS).open("wb") as out:
        for block in _blocks(read_stories(files)):
            pieces = _encode(block, tokenizer)
            np.concatenate(pieces, dtype=tokenizer.dtype, casting="unsafe").tofile(out)
            lengths.append(np.array([len(piece) for piece in pieces], np.int64))
            progress.add(block, sum(map(len, pieces)))
        out.flush()
        os.fsync(out.fileno())
    bounds = np.cumsum(np.concatenate(lengths))
    if len(bounds) == 1:
        raise DataError(
            f"{_names(files)} in {files[0].parent}: no text in {progress.size} bytes, expected "
            "one JSON string per line. Fill or remove it."
        )
    np.save(folder / _BOUNDS, bounds)


def _blocks(stories: Iterable[Story]) -> Iterator[list[Story]]:
    block: list[Story] = []
    size = 0
    for story in stories:
        block.append(story)
        size += len(story.text)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encode(block: Sequence[Story], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return tokenizer.encode_documents([story.text for story in block])
    except DataError:
        for story in block:  # a second pass, to say which one it was
            try:
                tokenizer.encode(story.text)
            except DataError as error:
                raise DataError(f"{story.path}, line {story.line}: {error}") from None
        raise


class _Progress:
    """Lines on stderr while many stories are tokenised; nothing where it is a matter of seconds."""

    def __init__(self, files: Sequence[Path]):
        self.size = sum(f.stat().st_size for f in files)
        self._what = _names(files)
        self._stories = self._tokens = self._characters = 0
        self._next = time.monotonic() + _SECONDS_BETWEEN_NOTES

    def add(self, block: Sequence[Story], tokens: int) -> None:
        """Count a block, and say how far it is if the last note was some time ago."""
        self._stories += len(block)
        self._tokens += tokens
        self._characters += sum(len(story.text) for story in block)
        if time.monotonic() >= self._next:
            self._next += _SECONDS_BETWEEN_NOTES
            share = min(self._characters / max(self.size, 1), 1.0)
            note = f"{self._stories:,} texts, {self._tokens:,} tokens, about {share:.0%}"
            print(f"Tokenising {self._what}: {note}", file=sys.stderr, flush=True)
