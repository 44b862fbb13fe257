"""The whole way through the command line: train, again, evaluate, sample; and being stopped.

The way is gone once in processes of its own, and with another preset in this one.
"""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli

pytestmark = pytest.mark.slow

LINES = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind?"]
FILES = [
    "config.json",
    "command.txt",
    "environment.json",
    "tokenizer.json",
    "metrics.jsonl",
    "plots/loss.png",
    "samples.txt",
    "run.md",
    "lock",
    "log.txt",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES * 60))
    return path


def verb(name, *args, code=0):
    """Run a verb here; return its output, or what it says of a mistake."""
    main = importlib.import_module(f"experiments.{name}").main
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.run(main, [*map(str, args)])
    assert stopped.value.code == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def process(name, *args):
    """Start a verb as users do."""
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, args)]
    # One device, unlike the other tests.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    own = {"XLA_FLAGS": flags, "COLUMNS": "100"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | own)


def train_args(preset, text, folder, steps):
    """Arguments of a small run, whose samples are longer than what the model sees at once."""
    args = ["--config", preset, "--data.path", text, "--run.dir", folder, "--run.steps", steps]
    args += ["--model.depth", 1, "--model.context-len", 16, "--optim.warmup-steps", 2]
    args += ["--run.eval-every", 10, "--run.eval-batches", 2]
    return [*args, "--run.samples", 4, "--run.sample-tokens", 20]


def test_train_evaluate_sample(text, tmp_path):
    run = tmp_path / "run"
    args = train_args("mm_tiny", text, run, 30)
    out = verb("train", *args)
    assert "Finished at step 30" in out
    assert all((run / name).stat().st_size for name in FILES)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert (run / "samples.txt").read_text().count("--- sample") == 4

    # Killed between the last update and the products: the same command makes them, the same ones.
    samples, card = (run / "samples.txt").read_text(), (run / "run.md").read_text()
    for name in ("samples.txt", "run.md"):
        (run / name).unlink()
    assert "already finished at step 30" in verb("train", *args)
    assert (run / "samples.txt").read_text() == samples
    assert (run / "run.md").read_text() == card

    out = verb("evaluate", "--run", run)
    found = json.loads((run / "evaluate.json").read_text())
    assert f"{found['loss']:.4f}" in out
    # The same split as random windows: a different estimate of the same loss.
    assert found["loss"] == pytest.approx(min(losses), abs=0.25)
    assert found["loss_ci95"][0] < found["loss"] < found["loss_ci95"][1]
    assert found["step"] == 30

    out = verb("sample", "--run", run, "--prompt", "To be", "--max-new-tokens", 100, "--seed", 3)
    assert re.fullmatch(r"To be(.|\n){100}\n", out)
    assert "'#'" in verb("sample", "--run", run, "--prompt", "#", code=2)


def test_mixer_flag_saved_config_and_folder_of_another_run(text, tmp_path):
    """A mixer of 2Mamba, so that these train and are sampled by the command line too."""
    run = tmp_path / "run"
    args = train_args("gpt_tiny", text, run, 4)
    verb("train", *args, "--mixer", "two_mamba")
    saved = json.loads((run / "config.json").read_text())
    assert saved["model"]["mixer"]["kind"] == "two_mamba"
    assert (run / "samples.txt").read_text().count("--- sample") == 4
    out = verb("train", "--config", run / "config.json")
    assert "already finished at step 4" in out
    err = verb("train", *args, code=2)
    assert "model.mixer.kind" in err
    assert "Traceback" not in err


def test_preempted_run_exits_with_75_and_is_evaluated_and_sampled(text, tmp_path):
    run = tmp_path / "run"
    with process("train", *train_args("gpt_tiny", text, run, 100_000)) as training:
        _wait_for(run / "metrics.jsonl", training)
        training.send_signal(signal.SIGTERM)
        training.communicate(timeout=60)
    assert training.returncode == 75
    assert not (run / "run.md").exists()
    prompt = ["--prompt", "To be", "--max-new-tokens", 10]
    # Both at once, as nothing keeps users from it.
    with process("evaluate", "--run", run) as one, process("sample", "--run", run, *prompt) as two:
        evaluated, sampled = one.communicate(timeout=120)[0], two.communicate(timeout=120)[0]
    assert (one.returncode, two.returncode) == (0, 0)
    assert "best checkpoint" in evaluated
    assert re.fullmatch(r"To be(.|\n){10}\n", sampled)


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run never reported"
        time.sleep(0.1)
