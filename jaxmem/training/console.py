"""What a run says: to the terminal with a progress bar, or as plain lines; always to log.txt."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from jaxmem.training.disk import disk_errors

# Columns of the progress line besides its words: the spaces around the bar, and the shortest bar.
_GAPS = 4


class RunLog:
    """Prints on process 0 only; everything printed also goes to `log.txt`."""

    def __init__(self, path: Path, *, stream: IO[str] | None = None):
        self._path = path
        self._speaks = jax.process_index() == 0
        self._file: IO[str] | None = None
        if self._speaks:
            with disk_errors(path):
                self._file = path.open("a", encoding="utf-8")
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self._file:
            # Every line was flushed, or its error raised: closing has nothing new to report.
            with suppress(OSError):
                self._file.close()

    def line(self, text: str = "") -> None:
        """Print one line and append it to the log."""
        if self._file is None:
            return
        self._console.print(text, markup=False)
        with disk_errors(self._path):
            self._file.write(text + "\n")
            self._file.flush()

    def start(self, done: int, total: int) -> None:
        """Show the progress bar if this is a terminal."""
        if not (self._speaks and self._console.is_terminal):
            return
        # In a narrow terminal the bar, which alone may wrap, gives way first, then the end of the
        # text; the counter never.
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", completed=done, total=total)
        self._bar.start()

    def progress(self, done: int, total: int, text: str, *, keep: bool) -> None:
        """Report progress: moves the bar; kept lines, and all lines elsewhere, are printed.

        Args:
          done: updates done.
          total: updates in all.
          text: losses, speed and time left.
          keep: print the line also on a terminal (evaluations).
        """
        if self._bar is not None:
            room = self._console.width - len(f"step {total}/{total}") - _GAPS
            shown = text[: max(room, 0)]
            self._bar.update(self._task, completed=done, description=shown, refresh=True)
        if keep or self._bar is None:
            self.line(f"step {done}/{total}  {text}")
        elif self._file is not None:
            with disk_errors(self._path):
                self._file.write(f"step {done}/{total}  {text}\n")
                self._file.flush()

    def stop(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def progress_text(
    row: Mapping[str, float], seconds_left: float | None, unit: str = "tokens"
) -> str:
    """Write a row of metrics as one line: losses, the task's metrics, speed, time left.

    Args:
      row: of metrics.
      seconds_left: until the end of the run, if that is known.
      unit: what the task counts, such as `tokens`.
    """
    names = {"train_loss": "loss", "eval_train_loss": "eval train", "val_loss": "val"}
    names |= {key: key.replace("_", " ") for key in row if key[:4] == "val_" and key not in names}
    parts = [f"{label} {row[key]:.4f}" for key, label in names.items() if key in row]
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} {unit}/s")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Write a time as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_bytes(number: float) -> str:
    """Write a size as `512 B`, `1.5 KiB`, `2.0 MiB`, and so on."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
