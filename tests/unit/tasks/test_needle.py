"""The needle task: what it scores, how it reads prompts longer than its rows, what it leaves."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
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
from jaxmem.data.needle import ANSWER, TOKENIZER, draw_prompt
from jaxmem.errors import ConfigError, NonFiniteLoss
from jaxmem.generate.prefill import with_context
from jaxmem.generate.sampling import Sampling
from jaxmem.generate.text import generate_text
from jaxmem.interop.attention_types import from_name
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.tasks import needle
from jaxmem.tasks.needle import NEW_TOKENS, NeedleConfig
from jaxmem.training.model import LoadedRun
from tests.helpers.drawn import drawn

CONFIG = NeedleConfig(lengths=(60, 90), depths=(0.0, 0.5, 1.0), test_prompts=4)
MODEL = DecoderConfig(
    context_len=70,
    dim=8,
    depth=1,
    mixer=AttentionConfig(num_heads=2),
    feed_forward=None,
    init="uniform",
)
OPTIONS = {"batch_size": 6, "seed": 0, "process_index": 0, "process_count": 1}


def untrained(task: Any) -> Any:
    return drawn(lambda: task.model.build(nnx.Rngs(0)), spread=0.2)


class Oracle(nnx.Module):
    """Says what it is told."""

    def __init__(self, logits: jax.Array):
        self.logits = nnx.data(logits)

    def __call__(self, tokens: jax.Array, **_: Any) -> Any:
        del tokens
        return SimpleNamespace(logits=self.logits, aux={})


def loss_of(task: Any) -> Callable[[np.ndarray, dict[str, np.ndarray]], Any]:
    """Return the loss of a model that expects these targets of a batch."""
    compute = jax.jit(lambda logits, batch: task.loss(Oracle(logits), batch))

    def loss(expected: np.ndarray, batch: dict[str, np.ndarray]) -> Any:
        one_hot = expected[..., None] == np.arange(TOKENIZER.vocab_size + 1)
        return jax.device_get(compute(np.float32(20 * one_hot), batch))

    return loss


def test_loss_and_accuracy_are_of_the_characters_of_answers():
    task = CONFIG.open(MODEL, DataConfig())
    assert task.model.vocab_size == TOKENIZER.vocab_size
    batch = next(task.batches("train", **OPTIONS))
    scored, loss = np.sum(batch["targets"] >= 0, axis=1), loss_of(task)
    right = loss(batch["targets"], batch)
    assert int(right.count) == np.sum(scored) >= 6 * ANSWER
    assert float(right.total) < 1e-3
    assert float(right.aux["accuracy"]) == 1.0
    wrong = loss(batch["targets"] + (np.arange(6) < 2)[:, None], batch)
    share = np.sum(scored[2:]) / np.sum(scored)
    assert float(wrong.aux["accuracy"]) == pytest.approx(share)


def test_micro_batches_add_up_to_the_same_accuracy():
    task = CONFIG.open(dataclasses.replace(MODEL, context_len=200), DataConfig())
    batch = next(task.batches("train", **OPTIONS))
    scored, loss = np.sum(batch["targets"] >= 0, axis=1), loss_of(task)
    assert len(set(scored)) > 2  # else any mean over rows would do
    expected = batch["targets"] + np.array([1, 0, 1, 0, 0, 0])[:, None]

    def sums(rows: slice) -> np.ndarray:
        found = loss(expected[rows], {name: array[rows] for name, array in batch.items()})
        return np.array([found.aux["accuracy"] * found.count, found.count])

    whole = sums(slice(6))
    for size in (1, 2, 3):
        parts = [sums(slice(start, start + size)) for start in range(0, 6, size)]
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


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
    longer = CONFIG.open(dataclasses.replace(MODEL, context_len=71), DataConfig())
    assert longer.fingerprint != task.fingerprint
    assert any("60 characters or more" in line for line in task.lines())


def test_prompts_beyond_the_context_are_read_whole():
    recurrent = dataclasses.replace(MODEL, mixer=from_name("linear", num_heads=2))
    model = untrained(CONFIG.open(recurrent, DataConfig()))
    prompt = draw_prompt(np.random.default_rng(0), 90, 0.0)

    @jax.jit
    def best(row: jax.Array, last: int) -> jax.Array:
        return jnp.argmax(model(row[None]).logits[0, last])

    row = np.zeros(90 + NEW_TOKENS, np.int32)  # what follows a token does not change it
    row[:90] = TOKENIZER.encode(prompt.text)
    for place in range(90, 90 + NEW_TOKENS):
        row[place] = best(row, place - 1)
    said = generate_text(
        with_context(model, 90 + NEW_TOKENS),
        TOKENIZER,
        [prompt.text],
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=0.0),
        key=jax.random.key(0),
    )
    assert said == [TOKENIZER.decode(row[90:])]
    assert model.config.context_len == 70


def test_finish_scores_every_length_and_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int]] = []

    def stand_in(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
        """Know the key where it stands first; else in one prompt of four."""
        assert options["max_new_tokens"] == 10
        assert options["sampling"].temperature == 0
        keys = [re.findall(r"\d{4}", prompt)[0] for prompt in prompts]
        asked.append((len(prompts), len(prompts[0])))
        known = len(prompts) if prompts[0].startswith("The pass key") else 1
        return [f"{key}. The" if n < known else "0. " for n, key in enumerate(keys)]

    monkeypatch.setattr(needle, "generate_text", stand_in)
    task = CONFIG.open(MODEL, DataConfig())
    model = untrained(task)
    (text,) = task.finish(model, SimpleNamespace(folder=tmp_path), jax.random.key(0))
    assert asked == [(4, 60)] * 3 + [(4, 90)] * 3
    result = json.loads((tmp_path / "needle.json").read_text())
    assert result == {
        "trained_at": 70,
        "lengths": [60, 90],
        "depths": [0.0, 0.5, 1.0],
        "accuracy": [[1.0, 1.0, 1.0], [1.0, 0.25, 0.25]],
    }
    assert "| 90 | 100% | 25% | 25% |" in text
    assert (tmp_path / "needle.md").read_text() == f"{text}\n"
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")}
    assert found == set(CONFIG.products)
    assert (tmp_path / "plots" / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_learned_positions_end_somewhere(tmp_path: Path):
    # Of 70 positions, 61 characters and all new ones but the last take all.
    config = dataclasses.replace(CONFIG, lengths=(61, 62), depths=(0.0, 0.5), test_prompts=2)
    model = dataclasses.replace(MODEL, positions="learned")
    task = config.open(model, DataConfig())
    (text,) = task.finish(untrained(task), SimpleNamespace(folder=tmp_path), jax.random.key(0))
    assert "| 62 | fails | fails |" in text
    accuracy = json.loads((tmp_path / "needle.json").read_text())["accuracy"]
    assert None not in accuracy[0]
    assert accuracy[1] == [None, None]


def test_a_model_of_nan_is_an_error_and_no_failure_to_read(tmp_path: Path):
    task = CONFIG.open(MODEL, DataConfig())
    model = untrained(task)
    table = model.embedding.table
    table[...] = np.full(table.shape, np.nan, np.float32)
    with pytest.raises(NonFiniteLoss):
        task.finish(model, SimpleNamespace(folder=tmp_path), jax.random.key(0))


def test_the_characters_of_prompts_are_no_tokenizer_for_other_texts():
    task = CONFIG.open(MODEL, DataConfig())
    run = LoadedRun(config=SimpleNamespace(task=CONFIG), model=None, task=task, step=0)
    with pytest.raises(ConfigError, match=r"needle, makes its own data.*run of language_modeling"):
        _ = run.tokenizer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (60, 59)}, "lengths of 60 or more"),
        ({"lengths": ()}, "lengths of 60 or more"),
        ({"test_prompts": 0}, "at least one prompt"),
        ({"depths": (0.5, 1.1)}, "depths from 0 to 1"),
        ({"depths": ()}, "depths from 0 to 1"),
    ],
)
def test_senseless_configs_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields).check(MODEL, DataConfig())


def test_models_and_data_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"context_len=64.*Use 65 or more"):
        CONFIG.check(dataclasses.replace(MODEL, context_len=64), DataConfig())
    with pytest.raises(ConfigError, match=r"data\.path"):
        CONFIG.check(MODEL, DataConfig(path="x"))
