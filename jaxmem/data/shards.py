"""Files of documents, read as a stream: JSON lines, plain or compressed, and Parquet.

A line is a JSON string, or an object with the text in one of its fields, as in FineWeb, the Pile
and SlimPajama. Documents come in the order of the files' names and, within a file, as stored.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmem.errors import DataError, MissingExtra

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
SUFFIXES = {
    "jsonl": (*JSON_LINES, *(f"{name}{end}" for name in JSON_LINES for end in COMPRESSED)),
    "parquet": (".parquet",),
}
"""Endings that say by themselves what a file holds, by kind of source."""
_TRAIN_SUFFIXES = {"jsonl": (".json", ".txt"), "parquet": ()}
_PREFIXES = {"train": ("train",), "validation": ("val", "test")}
_ROWS_AT_ONCE = 1024


class Story(NamedTuple):
    """One text and where it stands."""

    text: str
    path: Path
    line: int
    """Line, or row of a table, counted from 1."""


class HoldOut(NamedTuple):
    """Which documents are kept for validation."""

    share: float
    """Share of all documents, in (0, 1)."""
    seed: int

    def takes(self, text: str) -> bool:
        """Say whether a document is kept: its hash, as a number in [0, 1), is below `share`.

        The hash is of the text alone: how documents are cut into files, and in which order they
        come, does not matter, and copies of a document are all on the same side.
        """
        data = f"{self.seed}\n{text}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64


class Reading(NamedTuple):
    """What of the files is read, and how it is divided."""

    field: str = "text"
    """Field of JSON objects, or column of tables, that holds the text."""
    hold_out: HoldOut | None = None
    """Documents kept for validation; None: none are."""


def story_files(path: Path, kind: str = "jsonl") -> dict[str, list[Path]]:
    """Find the files of both splits.

    A file is the train split. In a folder, files below it count by the first part of their path: to
    the train split belong those that begin with ``train``, to validation those with ``val``, or if
    there is none ``test``. Where none begins with ``train``, all others are the train split.
    Several files are read in the order of their names. The validation split may have no file.

    Raises:
      DataError: the folder has no file for training.
    """
    if not path.is_dir():
        return {"train": [path], "validation": []}
    sure, possible = SUFFIXES[kind], _TRAIN_SUFFIXES[kind]
    files = sorted(f for f in path.rglob("*") if f.name.endswith(sure + possible) and f.is_file())
    found: dict[str, list[Path]] = {}
    for split, prefixes in _PREFIXES.items():
        by_prefix = ([f for f in files if _place(f, path).startswith(p)] for p in prefixes)
        found[split] = next(filter(None, by_prefix), [])
    held = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    if not found["train"]:
        others = (f for f in files if f.name.endswith(sure))
        found["train"] = [f for f in others if not _place(f, path).startswith(held)]
    if not found["train"]:
        raise DataError(
            f"The folder {path} holds no file train*{'|'.join(sure + possible)}, nor another one "
            f"of {', '.join(sure)}. Check the path, or rename the files; validation texts stand "
            "in val* or test*."
        )
    return found


def is_packed(files: Iterable[Path]) -> bool:
    """Say whether the sizes of some files tell nothing about the length of their texts."""
    return any(f.suffix in (*COMPRESSED, *SUFFIXES["parquet"]) for f in files)


def read_stories(files: Iterable[Path], field: str = "text") -> Iterator[Story]:
    """Read the texts one by one; blank lines are skipped.

    Raises:
      DataError: a file is damaged; a line is no UTF-8, no JSON, no string and no object with a
        string in `field`; or a table has no such column. The message names file and line.
    """
    for path in files:
        rows = _table_rows if path.suffix in SUFFIXES["parquet"] else _lines
        numbered = rows(path, field)
        while True:
            try:
                story = next(numbered, None)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(
                    f"{path} cannot be read: {error}. Fetch it again, or remove it."
                ) from error
            if story is None:
                break
            yield story


def characters(files: Iterable[Path], field: str = "text") -> str:
    """Return the distinct characters of the stories and of the newlines between them."""
    return "".join(set("\n").union(*(story.text for story in read_stories(files, field))))


def _place(file: Path, folder: Path) -> str:
    return file.relative_to(folder).parts[0]


def _lines(path: Path, field: str) -> Iterator[Story]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield Story(_parse(line, field, f"{path}, line {number}"), path, number)


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        pyarrow = _pyarrow(path)
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _table_rows(path: Path, field: str) -> Iterator[Story]:
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is no Parquet file, or damaged: {error}. Fetch it again."
        ) from None
    with table:
        columns = table.schema_arrow.names
        if field not in columns:
            raise DataError(
                f"{path} has no column {field!r}, but {', '.join(map(repr, columns))}. "
                "Name the one that holds the text by --data.field."
            )
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, row {number}: {field!r} holds {text!r:.40}, expected a text. "
                        "Mend or remove the row, or give another --data.field."
                    )
                yield Story(text, path, number)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(
            f"{path} is read by the package pyarrow, which is not installed. Run: pip install "
            f"pyarrow, or write the texts as .jsonl or .jsonl.gz."
        ) from None
    return pyarrow


def _parse(line: bytes, field: str, where: str) -> str:
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
            f'as "Once upon a time", or objects with a field {field!r}. Mend or remove the line; '
            "--data.source text reads plain text."
        ) from None
    if isinstance(value, dict):
        return _text_of(value, field, where)
    if not isinstance(value, str):
        kind = {list: "array", type(None): "null"}.get(type(value), "value")
        raise DataError(
            f"{where} holds a JSON {kind}, expected a string: {_short(line)}. "
            "Write each text as one JSON string on a line of its own, or as a field of an object."
        )
    return value


def _text_of(document: dict[str, Any], field: str, where: str) -> str:
    if field not in document:
        raise DataError(
            f"{where} holds a JSON object without {field!r}; its fields are "
            f"{', '.join(map(repr, document)) or '(none)'}. Name the one that holds the text by "
            "--data.field."
        )
    text = document[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {field!r} holds {text!r:.40}, expected a string. "
            "Mend or remove the line, or give another --data.field."
        )
    return text


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
