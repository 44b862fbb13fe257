"""A sweep that trains: stopped and gone on with, reported on, and where nothing can be trained."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from configs import suites
from experiments import cli, report, sweep, train

pytestmark = pytest.mark.slow

SUITE = """
from jaxmem.reports.sweep_suite import Cell, Suite

# With one schedule for both, they share their programs.
tiny = (
    "--data.path {text} --model.context-len 16 --model.dim 16 --model.depth 1 --mixer mlp "
    "--optim.warmup-steps 2 --optim.decay-steps 800 --run.eval-batches 1 --run.samples 0 "
)
suite = Suite(
    cells=(
        Cell(label="short", preset="gpt_tiny", published=2.0,
             overrides=tiny + "--run.steps 4 --run.eval-every 2"),
        Cell(label="long", preset="gpt_tiny", published=1.0,
             overrides=tiny + "--run.steps 800 --run.eval-every 400"),
    ),
    seeds=(5,),
)
"""


@pytest.fixture
def suite(tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "pair.py"
    text.write_text("Whether 'tis nobler in the mind to suffer\n" * 100)
    path.write_text(SUITE.format(text=text))
    return path


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Processes have one device, unlike the other tests, and compile a program once in all."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")


def call(capsys, verb, *args, code=0):
    """Run a verb in this process, which has imported all it needs; return what it prints."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(verb, args)
    out, err = capsys.readouterr()
    assert stopped.value.code == code, out + err
    return out


def results(tmp_path):
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def stop_when_it_has_reported(path):
    """Send SIGTERM to this process once a run has written three rows of metrics."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline, "the run never reported"
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("programs")
def test_a_stopped_sweep_goes_on_without_repeating_what_is_finished(tmp_path, suite, capsys):
    runs = tmp_path / "out" / "runs"
    # One run by hand, with the arguments that the sweep would give; then the sweep.
    short = suites.load(str(suite)).cells[0]
    where = ["--run.seed", "5", "--run.dir", str(runs / "short_5"), "--run.name", "short_5"]
    call(capsys, train.main, "--config", short.preset, *short.flags, *where)
    untouched = {p: p.stat().st_mtime_ns for p in (runs / "short_5").rglob("*") if p.is_file()}
    stop = (runs / "long_5" / "metrics.jsonl",)
    threading.Thread(target=stop_when_it_has_reported, args=stop, daemon=True).start()
    command = [sweep.main, "--suite", str(suite), "--out", str(tmp_path / "out")]
    out = call(capsys, *command, code=75)
    assert f"{runs / 'short_5'}: finished before" in out
    assert "the same command goes on" in out
    first = results(tmp_path)
    assert first["short"]["status"] == "finished"
    assert first["long"]["error"] == "stopped by a signal, after saving"
    assert 0 < int(first["long"]["step"]) < 800

    out = call(capsys, *command)
    assert f"{runs / 'short_5'}: finished before" in out
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    log = (runs / "long_5" / "log.txt").read_text()
    assert log.count("resume     from step") == 1
    second = results(tmp_path)
    assert second["short"] == first["short"]
    assert (second["long"]["status"], second["long"]["step"]) == ("finished", "800")
    assert float(second["long"]["value"]) < float(second["short"]["value"])
    assert "of 1 published orders of two cells: 0 agree, 0 disagree, 1 undecided" in out
    assert "| long | " in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "results.png").stat().st_size

    # The runs of a sweep are run folders like any other.
    folders = [str(runs / "short_5"), str(runs / "long_5")]
    out = call(capsys, report.main, *folders, "--out", str(tmp_path / "report"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| `run.steps` | `4` | `800` |" in text
    assert f"| {float(second['long']['value']):.4f} |" in out


@pytest.mark.usefixtures("programs")
def test_failing_runs_are_rows_and_the_sweep_itself_uses_no_device(tmp_path, suite):
    """On a platform that is not there a run fails; a sweep that asked for it would as well."""
    command = [sys.executable, "-m", "experiments.sweep", "--suite", str(suite)]
    command += ["--out", str(tmp_path / "out"), "--only", "short"]
    nowhere = os.environ | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=120)
    out, err = done.stdout, done.stderr
    assert done.returncode == 1, out + err
    found = results(tmp_path)
    assert [row["status"] for row in found.values()] == ["failed", "open"]
    assert "nowhere" in found["short"]["error"]
    assert "failed: short, seed 5: RuntimeError: " in out
    assert "Traceback" in (tmp_path / "out" / "errors" / "short_5.txt").read_text()
    assert "Traceback" not in out + err
