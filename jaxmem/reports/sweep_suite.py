"""Suites: what a sweep trains, with which seeds, and by what its results are compared."""

import math
import re
import shlex
from dataclasses import dataclass
from typing import Literal

from jaxmem.errors import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")
# What a sweep sets itself, and what would not train.
_RESERVED = frozenset(
    {"--config", "--run.dir", "--run.name", "--run.seed", "--help", "-h", "--print-config"}
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the comparison: a configuration that is trained once per seed."""

    label: str
    """Name in tables, and of the run folders: letters, digits, `.`, `+`, `_` and `-`."""
    preset: str
    """What `experiments.train --config` takes."""
    overrides: str = ""
    """Further flags of `experiments.train`, as they are typed there."""
    published: float | None = None
    """The suite's metric as published, on whatever scale: only the order of cells is compared."""

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.label):
            raise ConfigError(
                f"The label {self.label!r} of a cell cannot name a folder. Use letters, digits, "
                "`.`, `+`, `_` and `-`."
            )
        names = {flag.partition("=")[0] for flag in self.flags}
        if reserved := sorted(names & _RESERVED):
            raise ConfigError(
                f"The overrides of the cell {self.label!r} hold {', '.join(reserved)}, which a "
                "sweep sets itself. Leave it out."
            )
        if self.published is not None and not math.isfinite(self.published):
            raise ConfigError(
                f"The cell {self.label!r} has published={self.published}. Give a finite number, or "
                "None."
            )

    @property
    def flags(self) -> list[str]:
        """The overrides, one word each."""
        try:
            return shlex.split(self.overrides)
        except ValueError as error:  # a quotation mark without its twin
            raise ConfigError(
                f"The overrides of the cell {self.label!r} cannot be split into words: {error}. "
                "Mend the quotation marks."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Cells, the seeds that each is trained with, and the number that they are compared by."""

    cells: tuple[Cell, ...]
    """In the order of the tables."""
    seeds: tuple[int, ...]
    """One run per cell and seed."""
    metric: str = "val_loss"
    """Field of metrics.jsonl, read after the last update."""
    direction: Literal["lower", "higher"] = "lower"
    """Which value of the metric is better."""
    claims: tuple[tuple[str, str], ...] = ()
    """Labels (better, worse) of orders that are published in words, not in numbers."""

    def __post_init__(self) -> None:
        if not self.cells or not self.seeds:
            raise ConfigError("A suite needs at least one cell and one seed.")
        labels = [cell.label for cell in self.cells]
        for what, names in (("label", labels), ("seed", [str(seed) for seed in self.seeds])):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ConfigError(f"A suite has the {what} {twice[0]} more than once.")
        if min(self.seeds) < 0:
            raise ConfigError(f"A suite has the seed {min(self.seeds)}. Use 0 or more.")
        unknown = {label for claim in self.claims for label in claim} - set(labels)
        if unknown:
            raise ConfigError(
                f"A suite claims something of {', '.join(sorted(unknown))}, which is none of its "
                f"cells. The labels are {', '.join(labels)}."
            )
        if self.direction not in ("lower", "higher"):
            raise ConfigError(
                f"A suite has direction={self.direction!r}. Say whether 'lower' or 'higher' values "
                f"of {self.metric} are better."
            )
