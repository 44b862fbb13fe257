"""The recall task: what it scores, and what it leaves behind."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.data.recall import RecallShape
from jaxmem.errors import ConfigError, ShapeError
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.tasks.associative_recall import AssociativeRecallConfig
from tests.helpers.drawn import drawn

CONFIG = AssociativeRecallConfig(
    rows=RecallShape(pairs=3, questions=2, keys=4, values=4, fillers=3),
    lengths=(16, 24),
    test_rows=10,
)
MODEL = DecoderConfig(
    context_len=16,
    dim=8,
    depth=1,
    mixer=AttentionConfig(num_heads=2),
    feed_forward=MLPConfig(),
    positions="learned",
)
OPTIONS = {"batch_size": 6, "seed": 0, "process_index": 0, "process_count": 1}


class Oracle(nnx.Module):
    """Answers by looking the key up, rightly, or one value further back."""

    def __init__(self, wrong: int = 0):
        self.wrong = wrong

    def __call__(self, tokens: jax.Array, **_: Any) -> Any:
        same = tokens[:, :, None] == tokens[:, None, :]
        place = jnp.argmax(same, axis=2)  # the first time that the token stood
        answer = jnp.take_along_axis(tokens, jnp.minimum(place + 1, tokens.shape[1] - 1), axis=1)
        logits = 20.0 * jax.nn.one_hot(answer + self.wrong, CONFIG.rows.vocabulary)
        return SimpleNamespace(logits=logits, aux={})


def loss_of(task: Any, wrong: int = 0) -> Any:
    """Return the loss of the oracle on the first batch of a task."""
    batch = next(task.batches("train", **OPTIONS))
    return jax.jit(lambda batch: task.loss(Oracle(wrong), batch))(batch)


def test_loss_counts_answers_only():
    task = CONFIG.open(MODEL, DataConfig())
    assert task.model.vocab_size == 11
    right = loss_of(task)
    assert int(right.count) == 6 * 2
    assert float(right.aux["accuracy"]) == 1.0
    assert float(right.total) < 1e-3
    wrong = loss_of(task, wrong=-1)
    assert float(wrong.aux["accuracy"]) == 0.0
    assert float(wrong.total) / 12 == pytest.approx(20, abs=0.1)


def test_batches_are_a_function_of_their_number():
    task = CONFIG.open(MODEL, DataConfig())
    batches = task.batches("train", **OPTIONS)
    first, second = next(batches), next(batches)
    batches.set_state({"next": 0})
    for name, array in next(batches).items():
        np.testing.assert_array_equal(array, first[name])
        assert not np.array_equal(array, second[name])
    other = next(task.batches("validation", **OPTIONS))
    assert not np.array_equal(other["tokens"], first["tokens"])
    assert any("3 facts among filler, 2 questions" in line for line in task.lines())
    prints = {task.fingerprint}
    for fields in ({"keys": 5}, {"layout": "adjacent"}):
        other = dataclasses.replace(CONFIG, rows=dataclasses.replace(CONFIG.rows, **fields))
        prints.add(other.open(MODEL, DataConfig()).fingerprint)
    assert len(prints) == 3


def test_fingerprint_of_runs_without_a_layout_stays():
    facts = "(1, RecallShape(pairs=3, questions=2, keys=4, values=4, fillers=3), 16)"
    wanted = hashlib.sha256(facts.encode()).hexdigest()
    assert CONFIG.open(MODEL, DataConfig()).fingerprint == wanted


def test_adjacent_facts_are_recalled_exactly_or_not():
    rows = dataclasses.replace(CONFIG.rows, questions=3, layout="adjacent")
    config = dataclasses.replace(CONFIG, rows=rows)
    task = config.open(MODEL, DataConfig())
    right = loss_of(task)
    assert int(right.count) == 6 * 3
    assert float(right.aux["accuracy"]) == 1.0
    assert any("3 facts at the start, 3 questions" in line for line in task.lines())


def test_finish_measures_other_lengths(tmp_path: Path):
    task = CONFIG.open(dataclasses.replace(MODEL, positions="none"), DataConfig())
    (text,) = task.finish(Oracle(), SimpleNamespace(folder=tmp_path), jax.random.key(0))
    result = json.loads((tmp_path / "extrapolation.json").read_text())
    assert result == {"trained_at": 16, "accuracy": {"16": 1.0, "24": 1.0}}
    assert (tmp_path / "extrapolation.md").read_text() == f"{text}\n"
    assert "| 24 | 100.0% |" in text
    assert set(CONFIG.products) == {p.name for p in tmp_path.iterdir()}


def test_learned_positions_end_with_the_training_length(tmp_path: Path):
    config = dataclasses.replace(CONFIG, lengths=(16, 17))
    task = config.open(MODEL, DataConfig())
    model = drawn(lambda: task.model.build(nnx.Rngs(0)), spread=0.2)
    (text,) = task.finish(model, SimpleNamespace(folder=tmp_path), jax.random.key(0))
    assert "| 17 | fails |" in text
    result = json.loads((tmp_path / "extrapolation.json").read_text())
    assert 0 <= result["accuracy"]["16"] < 1
    assert result["accuracy"]["17"] is None


def test_errors_of_a_model_are_errors(tmp_path: Path):
    class Broken(nnx.Module):
        def __call__(self, tokens: jax.Array) -> Any:
            raise ShapeError(f"found {tokens.shape}")

    task = CONFIG.open(dataclasses.replace(MODEL, positions="none"), DataConfig())
    with pytest.raises(ShapeError, match="found"):
        task.finish(Broken(), SimpleNamespace(folder=tmp_path), jax.random.key(0))


@pytest.mark.parametrize("fields", [{"lengths": (16, 8)}, {"test_rows": 0}])
def test_senseless_configs_are_refused(fields: dict[str, Any]):
    with pytest.raises(ConfigError, match="Use lengths of 9 or more"):
        dataclasses.replace(CONFIG, **fields).check(MODEL, DataConfig())
    with pytest.raises(ConfigError, match=r"data\.path"):
        CONFIG.check(MODEL, DataConfig(path="x"))
