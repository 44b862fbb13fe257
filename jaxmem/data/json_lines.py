"""Documents of `jaxmem.data.shards`: tokenised once, then memory-mapped.

Token arrays are kept in the folder of `jaxmem.cache.cache_dir`, under a name that depends on the
files (place, size, time of the last change), on what is read of them, and on the tokenizer. Neither
the files nor the tokens are ever in memory as a whole.

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
from jaxmem.data.shards import Reading, Story, is_packed, read_stories
from jaxmem.data.tokenizers import Tokenizer
from jaxmem.errors import DataError

# Counts the changes of the arrays' layout; part of the folder's name.
_FORMAT = 2
_TOKENS, _BOUNDS = "tokens.bin", "bounds.npy"
# What precedes the names of these arrays for texts that are held out.
_HELD = "held_"
# Characters that are tokenised at once, on all cores; a batch takes some ten times as many bytes.
_BLOCK = 2**22
_SECONDS_BETWEEN_NOTES = 10.0


class StoryTokens(NamedTuple):
    """The tokens of some files, as views of memory-mapped arrays."""

    tokens: Integer[np.ndarray, "N"]
    """All stories, one after the other."""
    bounds: Int64[np.ndarray, "E"]
    """Story d holds the tokens bounds[d] to bounds[d + 1] - 1; one more entry than stories."""


def story_tokens(files: Sequence[Path], tokenizer: Tokenizer, field: str = "text") -> StoryTokens:
    """Return the tokens of all stories, each with its end; tokenise them if that was not done yet.

    Processes that ask at once wait for the first one. A kill leaves nothing that is taken for
    complete, and what it leaves is removed by the next call.

    Raises:
      DataError: see `read_stories`; a text does not fit the vocabulary; there is no story; or the
        cache folder cannot be written or is damaged.
    """
    return divided_tokens(files, tokenizer, Reading(field))["train"]


def divided_tokens(
    files: Sequence[Path], tokenizer: Tokenizer, reading: Reading
) -> dict[str, StoryTokens]:
    """Return the same by split: ``train``, and as ``validation`` the stories that are held out.

    Raises:
      DataError: see `story_tokens`.
    """
    folder = cache_dir() / "tokens" / _name(files, tokenizer, reading)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _prepare(files, tokenizer, folder, reading)
        return {
            "train": _open(folder, tokenizer, ""),
            "validation": _open(folder, tokenizer, _HELD),
        }
    except OSError as error:
        raise DataError(
            f"The tokens of {_names(files)} cannot be kept in {folder.parent}: {error}. "
            "Make room, or set JAXMEM_CACHE to a folder that can be written."
        ) from error


def _names(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more files"


def _name(files: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> str:
    """Name the folder of the arrays after all that they depend on."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = json.dumps([_FORMAT, tokenizer.fingerprint, facts, reading])
    return f"{files[0].stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _open(folder: Path, tokenizer: Tokenizer, side: str) -> StoryTokens:
    """Map the arrays of one side, after a look whether they belong together."""
    path = folder / f"{side}{_TOKENS}"
    try:
        bounds = np.load(folder / f"{side}{_BOUNDS}", mmap_mode="r", allow_pickle=False)
        if bounds[-1] == 0 == path.stat().st_size:  # which cannot be mapped
            return StoryTokens(np.zeros(0, tokenizer.dtype), bounds)
        tokens = np.memmap(path, dtype=tokenizer.dtype, mode="r")
        whole = len(tokens) == bounds[-1]
    except (ValueError, EOFError, FileNotFoundError):
        whole = False
    if not whole:
        raise DataError(
            f"The token arrays in {folder} are damaged. Delete that folder; the next run makes "
            "them again."
        )
    return StoryTokens(tokens, bounds)


def _prepare(files: Sequence[Path], tokenizer: Tokenizer, folder: Path, reading: Reading) -> None:
    """Write the arrays beside ``folder`` and rename the result into place, which is atomic."""
    with _turn(folder.with_name(f"{folder.name}.lock")) as alone:
        if folder.is_dir():  # another process has made it meanwhile
            return
        if alone:
            for left in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(files, tokenizer, partial, reading)
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


def _write(files: Sequence[Path], tokenizer: Tokenizer, folder: Path, reading: Reading) -> None:
    progress = _Progress(files)
    hold_out = reading.hold_out
    with _Arrays(folder, "", tokenizer) as kept, _Arrays(folder, _HELD, tokenizer) as held:
        for block in _blocks(read_stories(files, reading.field)):
            pieces = _encode(block, tokenizer)
            sides = [hold_out is not None and hold_out.takes(story.text) for story in block]
            for side, arrays in ((False, kept), (True, held)):
                arrays.add([p for p, s in zip(pieces, sides, strict=True) if s is side])
            progress.add(block, sum(map(len, pieces)))
        if not (kept.number or held.number):
            raise DataError(
                f"{_names(files)} in {files[0].parent}: no text in {progress.size} bytes, expected "
                "one JSON string per line, or rows of a table. Fill or remove it."
            )


class _Arrays:
    """The arrays of one side while they are written; complete when the context is left."""

    def __init__(self, folder: Path, side: str, tokenizer: Tokenizer):
        self._bounds = folder / f"{side}{_BOUNDS}"
        self._dtype = tokenizer.dtype
        self._lengths = [np.zeros(1, np.int64)]
        self._out = (folder / f"{side}{_TOKENS}").open("wb")
        self.number = 0

    def __enter__(self) -> "_Arrays":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._out as out:
            if kind is None:
                out.flush()
                os.fsync(out.fileno())
                np.save(self._bounds, np.cumsum(np.concatenate(self._lengths)))

    def add(self, pieces: Sequence[np.ndarray]) -> None:
        """Append texts."""
        if pieces:
            np.concatenate(pieces, dtype=self._dtype, casting="unsafe").tofile(self._out)
            self._lengths.append(np.array([len(piece) for piece in pieces], np.int64))
            self.number += len(pieces)


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
        self._packed = is_packed(files)
        self._places = {file: place for place, file in enumerate(files, start=1)}
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
            place = f"file {self._places[block[-1].path]} of {len(self._places)}"
            where = place if self._packed else f"about {share:.0%}"
            note = f"{self._stories:,} texts, {self._tokens:,} tokens, {where}"
            print(f"Tokenising {self._what}: {note}", file=sys.stderr, flush=True)
