"""`train` from config to run folder, and the folder's checks."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import CheckpointMismatch, ConfigError, DataError, JaxmemError
from jaxmem.tasks.language_modeling import fingerprint
from jaxmem.training.model import evaluate_batches, load_run
from jaxmem.training.run import TrainResult, train
from tests.helpers.tiny_run import LIGHT_MODEL, rows, tiny_batch, tiny_run, with_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run: config, result, and what `at_end` was given."""
    config = tiny_run(tmp_path_factory.mktemp("train") / "run")
    seen = []
    result = train(
        config, preset=config, command=["train", "a b"], at_end=lambda *x: seen.append(x)
    )
    return config, result, seen


def test_folder_holds_what_reproduces_the_run(finished):
    config, result, _ = finished
    folder = config.run.folder
    assert result == TrainResult(folder, 12, result.val_loss, "finished")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "command.txt", "environment.json", "tokenizer.json",
        "metrics.jsonl", "tensorboard", "checkpoints", "log.txt", "lock",
    }  # fmt: skip
    assert (folder / "command.txt").read_text() == "train 'a b'\n"
    assert json.loads((folder / "environment.json").read_text())["jax"] == jax.__version__


def test_rows_come_at_the_due_steps_with_their_fields(finished):
    config, result, _ = finished
    got = {row["step"]: row for row in rows(config.run.folder)}
    assert sorted(got) == [0, 3, 4, 6, 8, 9, 12]
    assert set(got[0]) == {"step", "tokens", "val_loss", "eval_train_loss"}
    assert set(got[3]) == {"step", "tokens", "train_loss", "lr", "grad_norm"}
    assert set(got[4]) == set(got[3]) | {"val_loss", "eval_train_loss"}
    assert [row["tokens"] for row in got.values()] == [64 * step for step in got]
    np.testing.assert_allclose(got[3]["lr"], 1e-2, rtol=1e-6)  # update 2 ends the warm-up
    assert got[12]["val_loss"] == result.val_loss < got[0]["val_loss"]


def test_log_says_what_ran(finished):
    config, _, _ = finished
    log = (config.run.folder / "log.txt").read_text()
    for words in (
        "jaxmem 0.", "overrides  none", "mesh none", "parameters ", "decay 0.1:", "decay 0:",
        "memory ", "attention: ", "per sequence of 8", "step 3/12  loss ", "Finished at step 12",
        "char vocabulary of 6", " train, ",
    ):  # fmt: skip
        assert words in log


def test_log_says_what_the_ops_of_this_step_chose_and_why(finished):
    config, _, _ = finished
    log = (config.run.folder / "log.txt").read_text()
    ops = [line for line in log.splitlines() if line.startswith("op  ")]
    assert len(ops) == 1  # the model has one op, although others are loaded
    assert ops[0].startswith("op         attention: xla (not cudnn: no GPU here, ")
    assert "; not pallas: no GPU here, " in ops[0]


def test_at_end_gets_the_trained_model(finished):
    config, result, seen = finished
    ((given, model, task),) = seen
    tokenizer = task.tokenizer
    assert given == result
    loaded = load_run(config.run.folder, checkpoint="last")
    tokens = tiny_batch(2)["tokens"] % tokenizer.vocab_size
    logits = nnx.jit(lambda model, tokens: model(tokens).logits)
    np.testing.assert_array_equal(logits(model, tokens), logits(loaded.model, tokens))
    assert loaded.step == 12
    assert loaded.config == config
    assert loaded.tokenizer.vocab_size == tokenizer.vocab_size


def test_best_is_the_lowest_validation_loss(finished):
    config, _, _ = finished
    losses = {row["step"]: row["val_loss"] for row in rows(config.run.folder) if "val_loss" in row}
    del losses[0]  # nothing is saved before the first update
    assert load_run(config.run.folder, checkpoint="best").step == min(losses, key=losses.get)
    with pytest.raises(CheckpointMismatch, match=r"no checkpoint of step 5; it has .*12"):
        load_run(config.run.folder, checkpoint=5)


def modified(folder):
    """When each file changed, but those that every start writes."""
    files = (path for path in folder.rglob("*") if path.name not in ("log.txt", "lock"))
    return {path: path.stat().st_mtime_ns for path in files}


def test_same_command_again_does_nothing(finished, capsys):
    config, result, _ = finished
    before = modified(config.run.folder)
    again = train(config)
    assert again == result._replace(stopped="already finished")
    assert "already finished at step 12; --run.steps M goes on" in capsys.readouterr().out
    assert before == modified(config.run.folder)


def test_another_config_is_refused_field_by_field(finished):
    config, _, _ = finished
    with pytest.raises(CheckpointMismatch, match=r"run\.seed: 1337 in the folder, 1 now") as err:
        train(with_run(config, seed=1, log_every=5))
    assert "--run.allow-config-change" in str(err.value)
    assert "log_every" not in str(err.value)


def test_foreign_or_broken_folders_are_refused_untouched(tmp_path):
    folder = tmp_path / "run"
    config = tiny_run(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"not a run folder; it holds thesis\.tex"):
        train(config)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    (folder / "config.json").write_text('{"model": ')
    with pytest.raises(CheckpointMismatch, match=r"config\.json is not valid JSON"):
        train(config)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        train(with_run(config, dir=str(file)))
    with pytest.raises(CheckpointMismatch, match=r"no config\.json"):
        load_run(tmp_path)


def test_vocabulary_must_cover_the_tokenizer(tmp_path):
    config = tiny_run(tmp_path / "run")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=2.*tokenizer's"):
        train(small)


def test_changed_text_is_noticed(finished, tmp_path):
    config, _, _ = finished
    text = config.run.folder.parent / "text.txt"
    before = text.read_text()
    try:
        text.write_text(before + "xyz")
        with pytest.raises(CheckpointMismatch, match="another vocabulary"):
            train(with_run(config, steps=14))
    finally:
        text.write_text(before)


def test_changed_text_with_the_same_vocabulary_is_noticed(tmp_path, capsys):
    config = tiny_run(tmp_path / "run", run={"steps": 4}, model=LIGHT_MODEL)
    train(config)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text()[::-1])
    described = (config.run.folder / "command.txt").read_text()
    with pytest.raises(CheckpointMismatch, match="text has changed, with the same vocabulary"):
        train(with_run(config, steps=6))
    assert (config.run.folder / "command.txt").read_text() == described
    capsys.readouterr()
    for steps in (6, 8):
        train(with_run(config, steps=steps, allow_config_change=True))
        assert ("note       the data changed" in capsys.readouterr().out) is (steps == 6)


def test_fingerprint_tells_tokens_apart(tmp_path):
    class Tokens(dict):
        tokens = dict.__getitem__

    array = np.arange(40 * 2**20 // 2, dtype=np.uint16)
    array.tofile(tmp_path / "a.bin")
    mapped = np.memmap(tmp_path / "a.bin", dtype=np.uint16, mode="r")
    small = Tokens(train=array[:100], validation=array[:9])
    assert fingerprint(small) == fingerprint(Tokens(train=array[:100].copy(), validation=array[:9]))
    changed = array[:100].copy()
    changed[50] += 1
    assert fingerprint(small) != fingerprint(Tokens(train=changed, validation=array[:9]))
    assert fingerprint(small) != fingerprint(Tokens(train=array[:99], validation=array[:9]))
    large = fingerprint(Tokens(train=mapped, validation=array[:9]))
    array[-1] = 1
    array.tofile(tmp_path / "b.bin")
    other = np.memmap(tmp_path / "b.bin", dtype=np.uint16, mode="r")
    assert large != fingerprint(Tokens(train=other, validation=array[:9]))


def test_start_that_fails_leaves_nothing_behind(tmp_path):
    config = tiny_run(tmp_path / "run")
    short = tmp_path / "short.txt"
    short.write_text("abc" * 10)
    for path, message in ((tmp_path / "none.txt", "does not exist"), (short, "does not fit")):
        bad = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))
        with pytest.raises(DataError, match=message):
            train(bad)
        assert not config.run.folder.exists()


def test_run_without_a_result_does_not_bind_the_next(tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", run={"steps": 2}, model=LIGHT_MODEL)
    other = tmp_path / "other.txt"
    other.write_text("xyz \n" * 100)
    first = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(other)))
    with monkeypatch.context() as patch:
        patch.setattr("jaxmem.training.run._assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(first)
    assert (config.run.folder / "config.json").exists()
    assert train(config).stopped == "finished"
    assert load_run(config.run.folder).config == config
    assert load_run(config.run.folder).tokenizer.decode([1, 2]) == " a"


def test_two_processes_cannot_share_a_folder(tmp_path):
    config = tiny_run(tmp_path / "run", run={"steps": 2}, model=LIGHT_MODEL)
    config.run.folder.mkdir()
    holder = (
        "import sys; from pathlib import Path; from jaxmem.training.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(config.run.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        owner = rf"process {process.pid} on .*trains in .*Stop it, or choose"
        with pytest.raises(JaxmemError, match=owner):
            train(config)
        assert [path.name for path in config.run.folder.iterdir()] == ["lock"]
        process.kill()
    assert train(config).stopped == "finished"


def test_means_over_batches_weight_by_tokens(finished):
    _, _, ((_, model, task),) = finished
    batches = [tiny_batch(2, length=8, scored=s, seed=i) for i, s in enumerate((1.0, 0.2))]
    for batch in batches:
        batch["tokens"] %= 5
        batch["targets"] %= 5
    whole = evaluate_batches(task, model, batches)
    parts = [evaluate_batches(task, model, [batch]) for batch in batches]
    assert whole["count"] == sum(part["count"] for part in parts)
    mean = sum(part["loss"] * part["count"] for part in parts) / whole["count"]
    np.testing.assert_allclose(whole["loss"], mean, rtol=1e-6)
