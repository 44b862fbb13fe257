"""Run the trainings of a sweep as subprocesses: several at once, each ending as it may.

This process leaves the devices to them: it must not ask JAX for any.
"""

import fcntl
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jaxmem.errors import JaxmemError
from jaxmem.reports.products import missing_products
from jaxmem.reports.runs import read_metrics
from jaxmem.training.config import EXEMPT, RunConfig, diff
from jaxmem.training.disk import disk_errors
from jaxmem.training.folder import saved_config
from jaxmem.training.stopping import EXIT_PREEMPTED, StopRequest

POLL_SECONDS = 0.1
"""Between looks at the processes; runs take minutes."""


class Job(NamedTuple):
    """One training."""

    config: RunConfig
    """What the command resolves to."""
    command: list[str]
    """Trains it, or goes on with it."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run.folder


class Ending(NamedTuple):
    """How a job ended."""

    job: Job
    error: str
    """In one line; empty if the run is finished."""
    began: bool
    """Whether it was started here; False if the run was finished before."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    errors: Path,
    ended: Callable[[Ending], None],
    say: Callable[[str], None],
) -> bool:
    """Run all jobs that are not finished.

    A first SIGTERM or SIGINT asks the running ones to save and stop, and no further one is started.
    If this process is killed, the running ones go on by themselves; the next call waits for them.

    Args:
      jobs: in the order in which they are started.
      at_once: processes at the same time.
      errors: folder for what failed runs wrote to stderr, one file per run.
      ended: called when a job ends, in this thread.
      say: takes lines for the user.

    Returns:
      Whether all jobs ended by themselves; False after a signal.
    """
    with disk_errors(errors):
        errors.mkdir(parents=True, exist_ok=True)
    queue = _Queue(list(jobs), errors, ended, say)
    with StopRequest() as stop:
        try:
            while queue.active or (queue.waiting and not stop.name):
                if stop.name:
                    queue.terminate()
                else:
                    queue.start(at_once)
                queue.collect()
                time.sleep(POLL_SECONDS)
        finally:
            # After an error here, such as a full disk, nobody would report on them.
            queue.terminate()
            queue.wait()
            with suppress(OSError):  # it holds the words of failed runs
                errors.rmdir()
    return not stop.name


def is_finished(config: RunConfig) -> bool:
    """Say whether the folder of a run holds this very run, with its last update and products."""
    folder = config.run.folder
    if not (folder / "config.json").is_file() or missing_products(config):
        return False
    try:
        changes = diff(saved_config(folder), config)
    except JaxmemError:  # the trainer will say what is wrong with the folder
        return False
    rows = read_metrics(folder)
    same = all(path in EXEMPT for path, _, _ in changes)
    return same and bool(rows) and rows[-1]["step"] >= config.run.steps


def is_training(folder: Path) -> bool:
    """Say whether a process holds the lock of a run folder."""
    try:
        file = (folder / "lock").open("rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def error_line(text: str, code: int) -> str:
    """Say in one line why a process ended.

    Args:
      text: what it wrote to stderr.
      code: its exit code, negative the number of the signal that killed it.

    Returns:
      The message that begins with `error: `, all its lines; else the last line, which names what a
      traceback is about; for a signal, its name. Empty if there was no error.
    """
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == EXIT_PREEMPTED:
        return "stopped by a signal, after saving"
    lines = [line for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    message = lines[starts[-1] :] if starts else lines[-1:]
    return " ".join(" ".join(message).removeprefix("error: ").split()) or f"exit code {code}"


class _Queue:
    """Jobs that wait, and the processes of those that run."""

    def __init__(
        self,
        waiting: list[Job],
        errors: Path,
        ended: Callable[[Ending], None],
        say: Callable[[str], None],
    ):
        self.waiting = waiting
        self.active: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self._errors = errors
        self._ended = ended
        self._say = say
        self._busy: set[Path] = set()
        self._terminated = False

    def start(self, at_once: int) -> None:
        """Start waiting jobs while there is room; what other processes train takes room as well."""
        busy = [job for job in self.waiting if is_training(job.folder)]
        for job in busy:
            if job.folder not in self._busy:
                self._say(f"{job.folder}: another process trains there; waiting for its end")
                self._busy.add(job.folder)
        for job in [job for job in self.waiting if job not in busy]:
            if len(self.active) + len(busy) >= at_once:
                return
            self.waiting.remove(job)
            if is_finished(job.config):
                self._ended(Ending(job, "", began=False))
            else:
                self._start(job)

    def _start(self, job: Job) -> None:
        self._say(f"{job.folder}: begins")
        with disk_errors(self._errors), self._log(job).open("wb") as stderr:
            # In a session of its own a run does not see Ctrl-C: two signals would not let it save.
            process = subprocess.Popen(
                job.command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        self.active.append((job, process))

    def collect(self) -> None:
        """Report the processes that have ended."""
        for entry in list(self.active):
            job, process = entry
            code = process.poll()
            if code is None:
                continue
            self.active.remove(entry)
            log = self._log(job)
            error = error_line(log.read_text("utf-8", errors="replace"), code)
            if not error:
                log.unlink()
            self._ended(Ending(job, error, began=True))

    def terminate(self) -> None:
        """Ask the running processes, once, to save and stop: a second signal would kill them."""
        if not self._terminated:
            self._terminated = True
            for _, process in self.active:
                process.terminate()

    def wait(self) -> None:
        """Wait for the processes that nobody has seen the end of."""
        for _, process in self.active:
            process.wait()

    def _log(self, job: Job) -> Path:
        return self._errors / f"{job.folder.name}.txt"
