"""A sweep that trains: stopped and gone on with, reported on, and where nothing can be trained."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import cli, report

pytestmark = pytest.mark.slow

SUITE = """
from jaxmem.reports.sweep_suite import Cell, Suite

tiny = (
    "--data.path {text} --model.context-len 16 --model.dim 16 --model.depth 1 "
    "--model.mixer.num-heads 2 --optim.warmup-steps 2 --run.eval-batches 1 --run.samples 0 "
)
suite = Suite(
    cells=(
        Cell(label="short", preset="gpt_tiny", published=2.0,
             overrides=tiny + "--run.steps 4 --run.eval-every 2"),
        Cell(label="long", preset="gpt_tiny", published=1.0,
             overrides=tiny + "--run.steps 1500 --run.eval-every 500"),
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


def start(tmp_path, suite, *args, platform="cpu"):
    # One device, unlike the other tests; level 0 halves the time to compile.
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAXMEM_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "experiments.sweep", "--suite", str(suite)]
    command += ["--out", str(tmp_path / "out"), *args]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(tmp_path):
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def wait_for_rows(path, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run never reported"
        time.sleep(0.05)


def test_a_stopped_sweep_goes_on_without_repeating_what_is_finished(tmp_path, suite, capsys):
    runs = tmp_path / "out" / "runs"
    with start(tmp_path, suite) as process:
        wait_for_rows(runs / "long_5" / "metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "the same command goes on" in out
    first = results(tmp_path)
    assert first["short"]["status"] == "finished"
    assert first["long"]["error"] == "stopped by a signal, after saving"
    assert 0 < int(first["long"]["step"]) < 1500
    untouched = {p: p.stat().st_mtime_ns for p in (runs / "short_5").rglob("*") if p.is_file()}

    with start(tmp_path, suite) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert f"{runs / 'short_5'}: finished before" in out
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    log = (runs / "long_5" / "log.txt").read_text()
    assert log.count("resume     from step") == 1
    second = results(tmp_path)
    assert second["short"] == first["short"]
    assert (second["long"]["status"], second["long"]["step"]) == ("finished", "1500")
    assert float(second["long"]["value"]) < float(second["short"]["value"])
    assert "of 1 published orders of two cells: 0 agree, 0 disagree, 1 undecided" in out
    assert "| long | " in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "results.png").stat().st_size

    # The runs of a sweep are run folders like any other.
    folders = [str(runs / "short_5"), str(runs / "long_5")]
    with pytest.raises(SystemExit) as stopped:
        cli.run(report.main, [*folders, "--out", str(tmp_path / "report")])
    assert stopped.value.code == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| `run.steps` | `4` | `1500` |" in text
    assert f"| {float(second['long']['value']):.4f} |" in capsys.readouterr().out


def test_failing_runs_are_rows_and_the_sweep_itself_uses_no_device(tmp_path, suite):
    """On a platform that is not there every run fails; a sweep that asked for it would as well."""
    with start(tmp_path, suite, "--jobs", "2", platform="nowhere") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    found = results(tmp_path)
    assert [row["status"] for row in found.values()] == ["failed", "failed"]
    assert all("nowhere" in row["error"] for row in found.values())
    assert "failed: long, seed 5: RuntimeError: " in out
    assert "Traceback" in (tmp_path / "out" / "errors" / "short_5.txt").read_text()
    assert "Traceback" not in out + err
