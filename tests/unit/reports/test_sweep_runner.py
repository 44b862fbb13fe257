"""Processes of a sweep: what is kept, waited for, stopped and reported."""

import dataclasses
import fcntl
import os
import signal
import sys
import threading
import time

import pytest

from jaxmem.reports import sweep_runner
from jaxmem.reports.sweep_runner import Job, error_line, is_finished, is_training, run_jobs
from tests.helpers.run_folders import run_config, write_run

LOSSES = {0: 4.0, 20: 2.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(sweep_runner, "POLL_SECONDS", 0.01)


def job(folder, script="pass"):
    return Job(run_config(folder), [sys.executable, "-S", "-c", script])


class Watched:
    """Calls `run_jobs` and keeps what it says."""

    def __init__(self, tmp_path, jobs, at_once=1):
        self.endings, self.lines = [], []
        self.done = run_jobs(
            jobs,
            at_once=at_once,
            errors=tmp_path / "errors",
            ended=self.endings.append,
            say=self.lines.append,
        )


def test_finished_runs_are_kept_and_failures_do_not_end_the_others(tmp_path):
    write_run(run_config(tmp_path / "old"), LOSSES)
    mark = tmp_path / "mark"
    bad = "import sys; print('error: no\\n data', file=sys.stderr); sys.exit(2)"
    jobs = [job(tmp_path / "old", "1 / 0"), job(tmp_path / "bad", bad)]
    jobs.append(job(tmp_path / "good", f"open({str(mark)!r}, 'w')"))
    found = Watched(tmp_path, jobs)
    assert found.done
    assert [(e.job.folder.name, e.error, e.began) for e in found.endings] == [
        ("old", "", False),
        ("bad", "no data", True),
        ("good", "", True),
    ]
    assert mark.exists()
    assert [path.name for path in (tmp_path / "errors").iterdir()] == ["bad.txt"]
    assert (tmp_path / "errors" / "bad.txt").read_text() == "error: no\n data\n"


def test_no_folder_is_left_where_nothing_failed(tmp_path):
    Watched(tmp_path, [job(tmp_path / "run")])
    assert not (tmp_path / "errors").exists()


def test_only_so_many_run_at_once(tmp_path):
    """Each process leaves the times of its begin and end."""
    script = (
        "import sys, time; begin = time.monotonic(); time.sleep(0.3); "
        "open({!r}, 'w').write(f'{{begin}} {{time.monotonic()}}')"
    )
    names = "abcd"
    found = Watched(
        tmp_path, [job(tmp_path / n, script.format(str(tmp_path / f"{n}.txt"))) for n in names], 2
    )
    assert [e.error for e in found.endings] == [""] * 4
    times = [tuple(map(float, (tmp_path / f"{n}.txt").read_text().split())) for n in names]
    running = [sum(begin <= at < end for begin, end in times) for at, _ in times]
    assert max(running) == 2


@pytest.mark.parametrize(
    ("at_once", "order"),
    [
        (1, [("run", "", False), ("other", "", True)]),  # there may be memory for one only
        (2, [("other", "", True), ("run", "", False)]),
    ],
)
def test_a_run_that_another_process_trains_is_waited_for(tmp_path, at_once, order):
    """As after a kill of the sweep alone: its last run goes on, and is not started again."""
    config = run_config(tmp_path / "run")
    config.run.folder.mkdir()
    held = (config.run.folder / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    assert is_training(config.run.folder)

    def end():
        write_run(config, LOSSES)
        held.close()

    threading.Timer(0.3, end).start()
    jobs = [job(config.run.folder, "1 / 0"), job(tmp_path / "other")]
    found = Watched(tmp_path, jobs, at_once)
    assert found.done
    assert [(e.job.folder.name, e.error, e.began) for e in found.endings] == order
    assert sum("another process trains there" in line for line in found.lines) == 1
    assert not is_training(config.run.folder)


def test_a_signal_lets_runs_save_and_starts_no_other(tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    script = (
        "import signal, sys, time\n"
        f"def save(*_): open({str(saved)!r}, 'a').write('once'); time.sleep(0.3); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"open({str(ready)!r}, 'w')\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    found = Watched(tmp_path, [job(tmp_path / "a", script), job(tmp_path / "b")])
    assert not found.done
    assert [(e.job.folder.name, e.error) for e in found.endings] == [
        ("a", "stopped by a signal, after saving")
    ]
    assert saved.read_text() == "once"  # a second signal would have killed it


def test_an_error_of_the_sweep_stops_its_runs(tmp_path):
    mark = tmp_path / "mark"
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(mark)!r}, 'w'), sys.exit()))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w')\n"
        "time.sleep(60)\n"
    )
    wait = (
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'ready')!r}): time.sleep(.01)"
    )

    def fail(ending):
        raise OSError("disk full")

    jobs = [job(tmp_path / "a", script), job(tmp_path / "b", wait)]
    with pytest.raises(OSError, match="disk full"):
        run_jobs(jobs, at_once=2, errors=tmp_path / "errors", ended=fail, say=print)
    assert mark.exists()


def test_a_run_is_finished_when_all_of_it_is_there(tmp_path):
    config = run_config(tmp_path / "run")
    assert not is_finished(config)
    write_run(config, LOSSES)
    assert is_finished(config)
    assert is_finished(dataclasses.replace(config, run=dataclasses.replace(config.run, name="x")))
    longer = dataclasses.replace(config.run, steps=21)
    assert not is_finished(dataclasses.replace(config, run=longer))
    seed = dataclasses.replace(config.run, seed=5)
    assert not is_finished(dataclasses.replace(config, run=seed))
    (tmp_path / "run" / "run.md").unlink()
    assert not is_finished(config)
    write_run(config, LOSSES)
    (tmp_path / "run" / "config.json").write_text("{")
    assert not is_finished(config)


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", 0, ""),
        ("a warning\n", 0, ""),
        ("note: x\nerror: It holds:\n  a: 1\n\nTake another.\n", 2, "It holds: a: 1 Take another."),
        ("Traceback ...\n  x\nValueError: bad\n\n", 1, "ValueError: bad"),
        ("", 3, "exit code 3"),
        ("half a line", -9, "killed by SIGKILL"),
        ("", 75, "stopped by a signal, after saving"),
    ],
)
def test_the_error_in_one_line(text, code, line):
    assert error_line(text, code) == line
