"""Kill a run of the command line at random moments; what it ends with must not show it.

`python -m tests.resume.kill_at_random --config mm_tiny --steps 120 --kills 10 --in-write 3`
trains once without interruption, then once more in another folder, where it is killed by SIGKILL
again and again and started again by the same command. At the end the rows of metrics, the samples
and every array of the last checkpoint must be equal, bit for bit. Exit code 0 if so, else 1.

What `--` does not name here is passed on to `experiments.train`, for example `--mixer mha`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmem.training.metrics import MACHINE_FIELDS
from tests.helpers.tiny_run import rows, saved_arrays

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0
"""Seconds that one start may take before it counts as hanging."""
LAST_TARGET = 0.75
"""The last kill is aimed at this part of the run at most, so that the run does not end before."""
JITTER = 0.03
"""Seconds that a kill comes after a line of progress at most; a few updates of a small model."""
LOG_EVERY, CHECKPOINT_EVERY, EVAL_EVERY = 3, 7, 30
"""Checkpoints lie between rows of metrics, so that a resume begins with half a row."""


class Kill(NamedTuple):
    """What was planned: the progress to wait for, and whether to hit a checkpoint write."""

    step: int
    in_write: bool


@dataclass
class Moment:
    """A kill as it happened."""

    seconds: float
    """Since the start of the process."""
    step: int | None
    """Last step that was reported; None before the first one."""
    inside: str
    """Name of the temporary folder that the kill left behind, empty if it left none."""


class Ended(Exception):
    """The run ended by itself before it could be killed."""


class Run:
    """One start of the training command; its output is read in the background."""

    def __init__(self, command: list[str], log: Path):
        self.began = time.perf_counter()
        self.step: int | None = None
        """Last step in the output."""
        self._log = log
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def seconds(self) -> float:
        """Return the time since the start."""
        return time.perf_counter() - self.began

    def check(self) -> None:
        """Raise if the run ended or hangs."""
        code = self._process.poll()
        if code is not None:
            raise Ended(f"the run ended with exit code {code} before the kill; see {self._log}")
        if self.seconds() > PATIENCE:
            self.kill()
            raise Ended(f"no end after {PATIENCE:.0f} s; see {self._log}")

    def sleep(self, seconds: float) -> None:
        """Sleep, but not past the end of the run."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self.check()
            time.sleep(min(left, 0.005))

    def kill(self) -> None:
        """Kill it without a chance to clean up, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def finish(self) -> int:
        """Wait for its end and return the exit code.

        Raises:
          Ended: it does not end.
        """
        try:
            code = self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Ended(f"no end after {PATIENCE:.0f} s; see {self._log}") from None
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("a", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                if line.startswith("step "):
                    self.step = int(line.split()[1].partition("/")[0])


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Return the names and inodes of the checkpoints that are not renamed to their final name."""
    found = set()
    try:
        with os.scandir(folder / "checkpoints") as entries:
            for entry in entries:
                if "tmp" in entry.name:
                    found.add((entry.name, entry.inode()))
    except FileNotFoundError:  # there is no such folder yet
        pass
    return found


def plan(rng: random.Random, steps: int, kills: int, in_write: int) -> list[Kill]:
    """Draw at which steps to kill, and which of the kills aim at a checkpoint write."""
    at = sorted(rng.randrange(int(LAST_TARGET * steps)) for _ in range(kills))
    writes = set(rng.sample(range(kills), in_write))
    return [Kill(step, number in writes) for number, step in enumerate(at)]


def kill_once(run: Run, kill: Kill, folder: Path, rng: random.Random, startup: float) -> Moment:
    """Wait for the planned moment and kill the run.

    A target that the run has already passed before it was killed the last time is met while it
    starts up; the other ones between two lines of progress.

    Args:
      run: a run that was just started.
      kill: the plan.
      folder: of the run.
      rng: draws the moment.
      startup: seconds to the first step of an undisturbed run.
    """
    stale = half_written(folder)
    early = kill.step == 0 and not kill.in_write
    while not early and (run.step is None or run.step < kill.step):
        run.sleep(0.002)
    if kill.in_write:
        while not half_written(folder) - stale:
            run.check()
    else:
        run.sleep(rng.uniform(0, startup if early else JITTER))
    moment = Moment(run.seconds(), run.step, "")
    run.kill()
    left = half_written(folder) - stale
    moment.inside = ", ".join(sorted(name for name, _ in left))
    return moment


def interrupted(
    command: list[str], folder: Path, kills: list[Kill], rng: random.Random, startup: float
) -> int:
    """Kill the run as planned, then let it finish; return how many kills were inside a write."""
    log, reached, inside = folder.with_suffix(".out"), -1, 0
    for number, kill in enumerate(kills, 1):
        while True:
            # Two targets at one place: the second kill comes while the run starts up.
            repeated = not kill.in_write and kill.step <= reached
            run = Run(command, log)
            moment = kill_once(
                run, kill._replace(step=0) if repeated else kill, folder, rng, startup
            )
            where = f"inside the write of {moment.inside}" if moment.inside else "not in a write"
            at = "before the first step" if moment.step is None else f"step {moment.step}"
            aim = ", aimed at a write" if kill.in_write else ""
            print(f"kill {number:2}: {moment.seconds:5.1f} s, {at}, {where}{aim}", flush=True)
            if moment.step is not None:
                reached = max(reached, moment.step)
            if moment.inside or not kill.in_write:
                break  # else the write ended between its detection and the kill: once more
        inside += bool(moment.inside)
    last = Run(command, log)
    code = last.finish()
    if code:
        raise Ended(f"the last start ended with exit code {code}; see {log}")
    return inside


def differences(whole: Path, killed: Path, steps: int) -> list[str]:
    """List what differs between the two runs."""
    found = []
    want_rows, got_rows = rows(whole), rows(killed)
    if len(want_rows) != len(got_rows):
        found.append(f"metrics.jsonl: {len(want_rows)} rows against {len(got_rows)}")
    pairs = zip(want_rows, got_rows, strict=False)
    found += [f"metrics.jsonl: {want} against {got}" for want, got in pairs if want != got]
    want, got = saved_arrays(whole, steps), saved_arrays(killed, steps)
    found += [f"array {name}: only in one run" for name in want.keys() ^ got.keys()]
    found += [
        f"array {name}" for name in want.keys() & got.keys() if not same(want[name], got[name])
    ]
    for name in ("samples.txt", "config.json"):
        if comparable(whole / name) != comparable(killed / name):
            found.append(name)
    print(f"compared: {len(want_rows)} rows without {sorted(MACHINE_FIELDS)}, {len(want)} arrays")
    return sorted(found)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether two arrays are equal bit for bit."""
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def comparable(path: Path) -> Any:
    """Return a file's content without the run's own folder."""
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return text
    tree = json.loads(text)
    return tree | {"run": tree["run"] | {"dir": None}}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; also return what is meant for `experiments.train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="mm_tiny", help="preset to train")
    parser.add_argument("--steps", type=int, default=120, help="updates of the run")
    parser.add_argument("--kills", type=int, default=10, help="how often to kill it")
    parser.add_argument("--in-write", type=int, default=3, help="kills inside a checkpoint write")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; else a temporary one")
    options, rest = parser.parse_known_args()
    if not 0 <= options.in_write <= options.kills:
        parser.error("--in-write must lie between 0 and --kills")
    if options.steps < EVAL_EVERY:
        parser.error(f"--steps must be {EVAL_EVERY} or more")
    return options, rest


def main() -> int:
    """Run both, compare them, and return the exit code."""
    options, rest = parse()
    rng = random.Random(options.seed)
    parent = options.folder or Path(tempfile.mkdtemp(prefix="kill_at_random_"))
    parent.mkdir(parents=True, exist_ok=True)
    whole, killed = parent.absolute() / "whole", parent.absolute() / "killed"
    if whole.exists() or killed.exists():
        print(f"{parent} holds runs already; name another --folder.", file=sys.stderr)
        return 1

    def command(folder: Path) -> list[str]:
        train = [sys.executable, "-m", "experiments.train", "--config", options.config]
        lengths = {"steps": options.steps, "log-every": LOG_EVERY, "eval-every": EVAL_EVERY}
        lengths |= {"eval-batches": 2, "checkpoint-every": CHECKPOINT_EVERY, "samples": 1}
        run = [part for name, value in lengths.items() for part in (f"--run.{name}", str(value))]
        return [*train, *run, "--run.dir", str(folder), *rest]

    try:
        first = Run(command(whole), whole.with_suffix(".out"))
        while first.step is None:
            first.sleep(0.01)
        startup = first.seconds()
        code = first.finish()
        if code:
            raise Ended(f"the uninterrupted run failed with {code}; see {parent}/whole.out")
        print(f"uninterrupted: {first.seconds():.1f} s, first step after {startup:.1f} s")
        kills = plan(rng, options.steps, options.kills, options.in_write)
        inside = interrupted(command(killed), killed, kills, rng, startup)
    except Ended as end:
        print(f"FAILED: {end}")
        return 1
    found = differences(whole, killed, options.steps)
    for line in found[:20]:
        print(f"differs: {line}")
    verdict = "FAILED" if found else "PASSED"
    print(f"{verdict}: {options.kills} kills, {inside} inside a write, {len(found)} differences")
    print(f"the runs are in {parent}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
