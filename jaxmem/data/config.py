"""What to train on, as a frozen dataclass; importing this module costs nothing."""

import dataclasses
from typing import Literal

from jaxmem.errors import ConfigError, unknown_name

Sampling = Literal["windows", "packed", "documents"]
SOURCES = ("auto", "corpus", "stories", "text", "jsonl", "parquet", "tokens")
PATHLESS = ("corpus", "stories")
"""Sources that come with the library and take no path."""
TFDS_PREFIX = "tfds:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text or tokens, how they become ids, and how sequences are drawn from them."""

    source: str = "auto"
    """auto, corpus (Shakespeare's plays, extra `corpus`), stories (short ones, made up by a
    program), text, jsonl (a JSON string or object per line), parquet, tokens, or
    tfds:NAME[/CONFIG].

    auto takes the corpus when there is no path, a token array for .bin, .npy and folders that
    hold train.bin, JSON lines for .jsonl and .ndjson (also .gz and .zst) and folders that hold
    train*.jsonl, Parquet likewise, and text for everything else."""

    path: str | None = None
    """Text file, folder of .txt/.md files, token array, file of JSON lines or Parquet, or folder of
    such files, with train* and val* (or test*) by name; with tfds:NAME the TFDS data folder."""

    field: str = "text"
    """Where the text stands in JSON objects, Parquet columns and features of TFDS."""

    validation_share: float = 0.0
    """Share of the documents that is kept for validation where the data have no such split, chosen
    by a hash of each text, however it is cut into files; 0: the last tenth."""

    validation_seed: int = 123
    """Another seed, other documents for validation."""

    tokenizer: str = "char"
    """char, byte, gpt2 (extra `corpus`), or the path of a tokenizer.json."""

    batch_size: int = 12
    """Sequences per update, summed over all devices and processes."""

    sampling: Sampling = "windows"
    """windows: uniformly random windows of the text; packed: whole documents, packed into rows;
    documents: the beginning of one document per row."""

    begin_of_text: bool = False
    """Rows of one document begin with the vocabulary's beginning-of-text token."""

    def __post_init__(self) -> None:
        """Check what can be checked without touching the disk."""
        if not self.source.startswith(TFDS_PREFIX) and self.source not in SOURCES:
            raise unknown_name("data.source", self.source, (*SOURCES, f"{TFDS_PREFIX}NAME"))
        if self.source == TFDS_PREFIX:
            raise ConfigError(
                f"data.source is {TFDS_PREFIX!r}, expected a TFDS name after the colon. "
                "Write for example tfds:tiny_shakespeare."
            )
        if self.source in PATHLESS and self.path is not None:
            raise ConfigError(
                f"data.source={self.source} takes no path, found data.path={self.path!r}. "
                "Drop the path, or use --data.source auto to read it."
            )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"data.validation_share={self.validation_share}, expected a share from 0 up to, "
                "but not including, 1. Give for example 0.001."
            )
        if self.begin_of_text and self.sampling != "documents":
            raise ConfigError(
                f"data.begin_of_text begins rows of one document, but data.sampling="
                f"{self.sampling}. Use --data.sampling documents, or leave it out."
            )
        if self.batch_size < 1:
            raise ConfigError(
                f"data.batch_size={self.batch_size}, expected at least 1. Give a positive number."
            )
