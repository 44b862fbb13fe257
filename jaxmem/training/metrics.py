"""Rows of metrics: always to metrics.jsonl, and to TensorBoard and, if asked, Weights & Biases.

A row is one JSON object: `step` (updates done), `tokens` (scored so far, or what else the task
counts), `train_loss` (mean over the tokens since the last row), `lr` and `grad_norm` of the last
update, the means of the task and the model under `aux/`, and after an evaluation `val_loss` and
`eval_train_loss` with the same means as `val_NAME` and `eval_train_NAME`; then the fields that
measure this machine: `seconds`, `tokens_per_s`, `step_ms`, `peak_bytes`.
"""

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import jax

from jaxmem.errors import MissingExtra
from jaxmem.training.disk import disk_errors

MACHINE_FIELDS = frozenset({"seconds", "tokens_per_s", "step_ms", "peak_bytes"})
"""Fields that differ between two equal runs."""

Row = dict[str, Any]


class Writer(Protocol):
    """Where rows of metrics go."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonlFile:
    """`metrics.jsonl`, one object per line, cut on resume to what the checkpoint counted."""

    def __init__(self, path: Path, position: int, warn: Callable[[str], None]):
        """Open the file at a byte position, creating it if there is none.

        Args:
          path: of the file.
          position: bytes that the restored checkpoint counted; what follows is cut off.
          warn: called with a message if the file is shorter than that.
        """
        self._path = path
        with disk_errors(path):
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            if size < position:
                warn(
                    f"{path.name} has {size} bytes, the checkpoint counted {position}: it was "
                    "shortened since, so rows before this step are missing."
                )
                self._file.seek(0)
                position = _last_newline(self._file.read())
            self._file.truncate(position)
            self._file.seek(position)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row and hand it to the operating system, so that a kill cannot lose it."""
        with disk_errors(self._path):
            _write_all(self._file, json.dumps(row).encode() + b"\n")

    def sync(self) -> None:
        """Wait until the rows are on the disk; called before a checkpoint that counts them."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoFile:
    """Stands in for `JsonlFile` on processes other than the first."""

    position = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Drop the row; process 0 writes it."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Scalars under `train/`, `eval/` and `speed/`, for `tensorboard --logdir`.

    Event files are written here, with tensorboardX's messages and checksums: its own writer has a
    thread and an exit hook, which on a full disk end in tracebacks beside the one message.
    """

    def __init__(self, folder: Path, *, resume_step: int | None):
        """Open an event file; on resume, later points of earlier files are marked as void."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: protobuf makes the names when imported

        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
            self._file = (folder / name).open("wb", buffering=0)
            self._add(Event(file_version="brain.Event:2"))
            if resume_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._add(Event(step=resume_step, session_log=start))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row's scalars."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: protobuf makes the names when imported
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: protobuf makes the names when imported

        values = [
            Summary.Value(tag=_tag(name), simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        with disk_errors(self._folder):
            self._add(Event(step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _add(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        data = event.SerializeToString()
        head = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
        _write_all(self._file, head + checks[0] + data + checks[1])


class WandB:
    """Reports to Weights & Biases; a resumed run goes on under the same id."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]):
        """Start or go on with the run.

        Raises:
          MissingExtra: wandb is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]: an extra, absent by default
        except ImportError as err:
            raise MissingExtra(
                "`run.wandb` needs Weights & Biases, which is not installed. "
                "Use `pip install 'jaxmem[wandb]'`, or leave the flag out."
            ) from err
        run_id = name.replace("/", "-")
        self._run = wandb.init(
            project="jaxmem",
            id=run_id,
            name=name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the row at its step."""
        values = {_tag(name): value for name, value in row.items() if name != "step"}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


def peak_bytes() -> int:
    """Return the most memory used so far: of the first device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Write to an unbuffered file; nothing stays behind for closing it to write again."""
    while data:
        data = data[file.write(data) :]


def _tag(name: str) -> str:
    if name in MACHINE_FIELDS:
        return f"speed/{name}"
    if name.startswith(("val_", "eval_train_")):
        return f"eval/{name}"
    return f"train/{name}"


def _last_newline(data: bytes) -> int:
    return data.rfind(b"\n") + 1
