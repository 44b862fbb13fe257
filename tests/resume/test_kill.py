"""Real signals to real processes, some of them in the middle of writing a checkpoint."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmem.training.run import train
from jaxmem.training.stopping import EXIT_PREEMPTED
from tests.helpers.tiny_run import KILL_RUN, rows, saved_arrays, tiny_run

ROOT = Path(__file__).parents[2]


def start(folder):
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.tiny_run", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for_step(process):
    """Read the output up to the first line of progress after the start."""
    for line in process.stdout:
        if line.startswith("step "):
            return
    pytest.fail(f"ended with {process.wait()} before its first step")


def kill_inside_a_write(process, folder):
    """Kill the process while a checkpoint is half written; say whether there was such a moment."""
    while process.poll() is None:
        if writing(folder):
            # Stopped first: otherwise the write may end between the look and the kill.
            process.send_signal(signal.SIGSTOP)
            if writing(folder):
                process.kill()
                return True
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    return False


def writing(folder):
    return any((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigkill_at_random_moments_and_sigterm_leave_no_trace(tmp_path):
    whole = tiny_run(tmp_path / "whole", run=KILL_RUN)
    train(whole)
    folder, rng = tmp_path / "killed", random.Random(0)
    for attempt in range(5):
        process = start(folder)
        wait_for_step(process)
        if attempt in (1, 3):
            assert kill_inside_a_write(process, folder)
        else:
            time.sleep(rng.uniform(0.2, 1.0))
            process.send_signal(signal.SIGTERM if attempt == 4 else signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == (EXIT_PREEMPTED if attempt == 4 else -signal.SIGKILL)
    process = start(folder)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert rows(folder) == rows(whole.run.folder)
    want = saved_arrays(whole.run.folder, 60)
    got = saved_arrays(folder, 60)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
