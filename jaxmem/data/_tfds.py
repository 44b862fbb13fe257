"""TFDS sets as lists of texts, read through ``as_data_source``; TensorFlow is never imported."""

import contextlib
import difflib
import inspect
import logging
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError

_READ_AT_ONCE = 1024


def read_texts(builder: Any, split: str, feature: str) -> list[str]:
    """Read one text feature of one prepared split, in stored order."""
    source = builder.as_data_source(split=split)
    texts: list[str] = []
    for first in range(0, len(source), _READ_AT_ONCE):
        records = source.__getitems__(range(first, min(first + _READ_AT_ONCE, len(source))))
        texts.extend(record[feature].decode("utf-8") for record in records)
    return texts


@contextlib.contextmanager
def _unprepared_is_no_news() -> Iterator[None]:
    """Drop the one warning that TFDS logs for every set that is not prepared yet."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith("has no dataset_info.json")

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@_unprepared_is_no_news()
def named_set(name: str, data_dir: str | None, field: str = "text") -> dict[str, list[str]]:
    """Read the train and, where there is one, the validation split of a TFDS text set.

    A set that is not prepared yet is downloaded and prepared by TFDS as ArrayRecord; without a
    network TFDS tries for about three minutes before it fails. All texts are held in memory.

    Args:
      name: ``NAME`` or ``NAME/CONFIG``, as TFDS lists them.
      data_dir: TFDS data folder; None means $TFDS_DATA_DIR, else TFDS's default.
      field: feature that holds the text; for ``text``, another one will do if there is no other.

    Raises:
      DataError: unknown set, no network, no text feature, no train split, or prepared in a file
        format without random access.
    """
    builder = _builder(name, data_dir or os.environ.get("TFDS_DATA_DIR"))
    feature = _text_feature(name, builder.info.features, field)
    if not builder.is_prepared():
        _prepare(name, builder)
    splits = [split for split in ("train", "validation") if split in builder.info.splits]
    if "train" not in splits:
        raise DataError(
            f"tfds:{name} has the splits {', '.join(sorted(builder.info.splits)) or '(none)'}; "
            "expected train. Choose another set."
        )
    return {split: read_texts(builder, split, feature) for split in splits}


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except registered.DatasetNotFoundError:
        # The list of community sets lies behind TensorFlow's file access.
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0], known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Check the name."
        raise DataError(
            f"TFDS knows no set {name!r}, and {data_dir or 'its default folder'} holds none. "
            f"{hint} The folder of a set of your own goes into --data.path."
        ) from None
    except ValueError as error:
        raise DataError(
            f"TFDS cannot build {name!r}: {_first_line(error)} Check name and configuration. A set "
            "that was prepared in another format has to be prepared again, with "
            "file_format='array_record' and in another folder, which goes into --data.path."
        ) from None


def _text_feature(name: str, features: Any, field: str) -> str:
    import tensorflow_datasets as tfds

    named = features if isinstance(features, tfds.features.FeaturesDict) else {}
    texts = sorted(key for key in named if isinstance(named[key], tfds.features.Text))
    if field in texts:
        return field
    if field == "text" and len(texts) == 1:
        return texts[0]
    raise DataError(
        f"tfds:{name} has the text features {', '.join(texts) or '(none)'}; expected one named "
        f"{field}{', or exactly one' * (field == 'text')}. Name one by --data.field, choose "
        "another set, or write its texts to files."
    )


def _prepare(name: str, builder: Any) -> None:
    # TFDS 4.9.10 finds this path with importlib_resources, which it does not install.
    type(builder).code_path = Path(inspect.getfile(type(builder)))
    try:
        with _file_access_without_tensorflow(builder):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise DataError(
            f"TFDS could not prepare {name} in {builder.data_dir}: {type(error).__name__}: "
            f"{_first_line(error)} With a network, run the command again; without one, prepare the "
            "set elsewhere as array_record and give the copied folder as --data.path. A set whose "
            "builder itself needs TensorFlow has to be prepared where TensorFlow is installed."
        ) from error


@contextlib.contextmanager
def _file_access_without_tensorflow(builder: Any) -> Iterator[None]:
    """Let a builder that uses TensorFlow only to open local files do so without it.

    Many TFDS builders, tiny_shakespeare among them, read what they downloaded through
    ``tf.io.gfile``. While one prepares itself, the lazy ``tf`` of its module is replaced by the
    same functions of the standard library; anything else of TensorFlow fails with its name.
    """
    module = sys.modules[type(builder).__module__]
    original = vars(module).get("tf")
    if original is None:
        yield
        return
    gfile = types.SimpleNamespace(
        GFile=_open_file,
        exists=os.path.exists,
        isdir=os.path.isdir,
        listdir=os.listdir,
        makedirs=lambda path: os.makedirs(path, exist_ok=True),
        copy=shutil.copyfile,
    )
    vars(module)["tf"] = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    try:
        yield
    finally:
        vars(module)["tf"] = original


def _open_file(name: str | os.PathLike[str], mode: str = "r") -> Any:
    # newline="": TensorFlow's GFile does not translate line ends, and a set's text must not
    # depend on who opened it.
    if "b" in mode:
        return open(name, mode)
    return open(name, mode, encoding="utf-8", newline="")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
