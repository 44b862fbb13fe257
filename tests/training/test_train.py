"""`train` from config to run folder, and the folder's checks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import CheckpointMismatch, ConfigError
from jaxmem.training.model import load_run, mean_loss
from jaxmem.training.run import TrainResult, train
from tests.helpers.tiny_run import rows, tiny_batch, tiny_run, with_run


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
        "metrics.jsonl", "tensorboard", "checkpoints", "log.txt",
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
    ):  # fmt: skip
        assert words in log


def test_at_end_gets_the_trained_model(finished):
    config, result, seen = finished
    ((given, model, tokenizer),) = seen
    assert given == result
    loaded = load_run(config.run.folder, checkpoint="last")
    tokens = jnp.asarray(tiny_batch(2)["tokens"] % tokenizer.vocab_size)
    np.testing.assert_array_equal(model(tokens).logits, loaded.model(tokens).logits)
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


def test_same_command_again_does_nothing(finished, capsys):
    config, result, _ = finished
    before = {p: p.stat().st_mtime_ns for p in config.run.folder.rglob("*") if p.name != "log.txt"}
    again = train(config)
    assert again == result._replace(stopped="already finished")
    assert "already finished at step 12; --run.steps M goes on" in capsys.readouterr().out
    assert before == {
        p: p.stat().st_mtime_ns for p in config.run.folder.rglob("*") if p.name != "log.txt"
    }


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
    import dataclasses

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


def test_mean_loss_weights_by_tokens(finished):
    _, _, ((_, model, _),) = finished
    batches = [tiny_batch(2, length=8, scored=s, seed=i) for i, s in enumerate((1.0, 0.2))]
    for batch in batches:
        batch["tokens"] %= 5
        batch["targets"] %= 5
    loss, tokens = mean_loss(model, batches)
    parts = [mean_loss(model, [batch]) for batch in batches]
    assert tokens == sum(count for _, count in parts)
    np.testing.assert_allclose(loss, sum(x * n for x, n in parts) / tokens, rtol=1e-6)
