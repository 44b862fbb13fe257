"""Real signals to real processes, some of them in the middle of writing a checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmem.training.stopping import EXIT_PREEMPTED
from tests.helpers.tiny_run import KILL_RUN, rows, saved_arrays

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    """A process that trains in children of its own; see `tests.helpers.tiny_run.serve`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.tiny_run"]
    # One thread: a process may fork only as long as it has no other.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def start(server, folder):
    """Start the run in a new process; return its id."""
    server.stdin.write(f"{folder}\n")
    server.stdin.flush()
    return int(wait_for(server, "pid "))


def wait_for(server, head):
    """Read the output up to a line with this beginning; return what follows in the line."""
    for line in server.stdout:
        if line.startswith(head):
            return line.removeprefix(head)
        if line.startswith("ended "):
            break
    pytest.fail(f"no {head!r} before the end")


def kill_inside_a_write(process, folder):
    """Kill the process while a checkpoint is half written."""
    while True:  # up to the end of the process, which then has no such id
        if writing(folder):
            # Stopped first: otherwise the write may end between the look and the kill.
            os.kill(process, signal.SIGSTOP)
            if writing(folder):
                os.kill(process, signal.SIGKILL)
                return
            os.kill(process, signal.SIGCONT)
        os.kill(process, 0)
        time.sleep(0.001)


def writing(folder):
    return any((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigkill_at_random_moments_and_sigterm_leave_no_trace(tmp_path, server):
    whole, folder, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    start(server, whole)
    assert int(wait_for(server, "ended ")) == 0
    for end in ("anywhere", "inside a write", "inside a write", "by SIGTERM"):
        process = start(server, folder)
        for _ in range(rng.randint(1, 4)):
            wait_for(server, "step ")
        if end == "inside a write":
            kill_inside_a_write(process, folder)
        else:
            # Two updates and the write of a checkpoint take about as long.
            time.sleep(rng.uniform(0.0, 0.2))
            os.kill(process, signal.SIGTERM if end == "by SIGTERM" else signal.SIGKILL)
        code = EXIT_PREEMPTED if end == "by SIGTERM" else -signal.SIGKILL
        assert int(wait_for(server, "ended ")) == code, end
    start(server, folder)
    assert int(wait_for(server, "ended ")) == 0
    assert rows(folder) == rows(whole)
    want, got = (saved_arrays(run, KILL_RUN["steps"]) for run in (whole, folder))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
