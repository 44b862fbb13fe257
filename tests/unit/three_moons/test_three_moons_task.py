"""Three moons as a task: its loss, its batches, its configs, and a run from start to finish."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import configs
from jaxmem.backbones.three_moons import ThreeMoons, ThreeMoonsConfig
from jaxmem.data.config import DataConfig
from jaxmem.data.three_moons import windows
from jaxmem.errors import ConfigError, DataError
from jaxmem.tasks.three_moons import ThreeMoonsTask, ThreeMoonsTaskConfig, clipped_square_sum
from jaxmem.training.config import RunConfig, from_json, to_json
from tests.helpers.drawn import drawn

PRESETS = [name for name in configs.names() if name.startswith("three_moons_")]


def opened(context_len: int = 20, **fields: object) -> ThreeMoonsTask:
    model = ThreeMoonsConfig(context_len=context_len)
    return ThreeMoonsTaskConfig(**fields).open(model, DataConfig(batch_size=4))


def untrained(task: ThreeMoonsTask) -> Any:
    return drawn(lambda: task.model.build(nnx.Rngs(0)), spread=0.2)


def test_loss_is_the_mean_clipped_square():
    y = np.float32([[[0.1, 0.0], [2.0, -0.3]]])
    total, count = jax.jit(clipped_square_sum)(y, np.zeros_like(y))
    assert (float(total), int(count)) == (pytest.approx((0.01 + 0.25 + 0.09) / 2), 2)


def test_residuals_beyond_the_clip_have_no_gradient():
    y = np.float32([[[0.4, 0.6], [-0.7, -0.2]]])
    grad = jax.jit(jax.grad(lambda y: clipped_square_sum(y, jnp.zeros_like(y))[0]))(y)
    np.testing.assert_allclose(grad, [[[0.4, 0.0], [0.0, -0.2]]], rtol=1e-6)


def test_parts_of_a_batch_add_up():
    task = opened()
    model = untrained(task)
    batch = next(task.batches("train", batch_size=4, seed=1, process_index=0, process_count=1))
    loss = jax.jit(lambda batch: task.loss(model, batch))
    whole = loss(batch)
    parts = [loss({n: rows[i : i + 2] for n, rows in batch.items()}) for i in (0, 2)]
    assert int(whole.count) == sum(int(p.count) for p in parts) == 80
    for total in ("total", "error"):
        pick = (lambda out: out.total) if total == "total" else (lambda out: out.aux["error"] / 2)
        scale = 1.0 if total == "total" else 0.5
        assert sum(map(pick, parts)) == pytest.approx(float(pick(whole) / scale), rel=1e-5)


def test_batches_go_on_from_a_position_and_split_over_processes():
    task = opened()

    def batches(index: int = 0, count: int = 1):
        return task.batches("train", batch_size=4, seed=7, process_index=index, process_count=count)

    whole = batches()
    next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    second = next(whole)["x"]
    np.testing.assert_array_equal(
        second, windows("train", 1, context_len=20, batch_size=4, seed=7)["x"]
    )
    other = batches()
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["x"], second)
    shares = []
    for index in (0, 1):
        part = batches(index, 2)
        part.set_state(state)
        shares.append(next(part)["x"])
    assert {row.tobytes() for row in np.concatenate(shares)} == {row.tobytes() for row in second}


def test_fingerprint_tells_observers_and_contexts_apart():
    prints = [opened().fingerprint, opened(observer="planet").fingerprint, opened(40).fingerprint]
    assert len(set(prints)) == 3
    assert opened(starts=3).fingerprint == prints[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_state_their_claim(name: str):
    config = configs.load(name)
    assert from_json(to_json(config)) == config
    claims = {1: "system", 3: "orbit"}
    expected = "nothing" if name.endswith("tiny") else claims[config.model.num_heads]
    assert config.task.expect == expected
    assert (config.optim.schedule, config.optim.lr, config.optim.min_lr) == ("linear", 1e-2, 5e-6)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.999, 0.0)
    assert config.optim.clip_norm == 0.0


@pytest.mark.parametrize(
    ("model", "task", "data", "words"),
    [
        ({"input_dim": 8}, {}, {}, "three moons are 6 numbers"),
        ({"context_len": 15}, {}, {}, "too short to see a moon go round. Use 16"),
        ({}, {"starts": 0}, {}, "task.starts=0"),
        ({}, {"horizon": -1}, {}, "task.horizon=-1"),
        ({}, {}, {"path": "moons.txt"}, "data.path=moons.txt"),
    ],
)
def test_what_does_not_fit_is_refused(model: dict, task: dict, data: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        RunConfig(
            model=ThreeMoonsConfig(**model),
            task=ThreeMoonsTaskConfig(**task),
            data=DataConfig(**data),
        )


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="needs a model of kind 'three_moons'"):
        RunConfig(model=configs.load("mm_tiny").model, task=ThreeMoonsTaskConfig())


def test_window_that_does_not_fit_on_the_grid_is_refused_before_anything_is_written():
    with pytest.raises(DataError, match=r"model\.context_len"):
        opened(5000)


def test_finish_writes_every_product_and_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One program instead of one for each of its operations.
    monkeypatch.setattr(ThreeMoons, "attention_weights", nnx.jit(ThreeMoons.attention_weights))

    class Run:
        folder = tmp_path
        samples = sample_tokens = 0

    task = opened(starts=2, horizon=3, expect="orbit")
    model = untrained(task)
    (text,) = task.finish(model, Run(), jax.random.key(0))
    files = [tmp_path / name for name in task.config.products]
    first = [path.read_bytes() for path in files]
    assert "DOES NOT HOLD" in text  # the model is not trained
    assert text in (tmp_path / "three_moons.md").read_text()
    facts = json.loads((tmp_path / "three_moons.json").read_text())
    assert facts["holds"] is False
    assert facts["systems"]["training"]["contexts"] == list(range(1, 21))
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files if path.suffix == ".png")
    assert task.finish(model, Run(), jax.random.key(0)) == [text]
    assert [path.read_bytes() for path in files] == first
