"""The task contract: any registered task trains, reports, resumes, and is read back from JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import configs
from experiments import cli, evaluate, sample
from jaxmem.backbones.base import ModelConfig, model_class, model_names, with_vocabulary
from jaxmem.data.automata import PromptShape
from jaxmem.data.config import DataConfig
from jaxmem.errors import CheckpointMismatch, ConfigError, NonFiniteLoss, UnknownName
from jaxmem.registry import Registry
from jaxmem.reports.products import files, make_products, missing_products
from jaxmem.tasks.base import (
    CountedBatches,
    Task,
    TaskConfig,
    TaskLoss,
    task_name,
    task_names,
)
from jaxmem.tasks.in_context import InContextConfig
from jaxmem.tasks.language_modeling import LanguageModelingConfig
from jaxmem.training.config import RunConfig, from_json, to_dict, to_json
from jaxmem.training.loop import Loop
from jaxmem.training.run import train
from tests.helpers.tiny_run import LIGHT_MODEL, rows, saved_arrays, tiny_run, with_run

PROMPT = PromptShape(min_strings=2, max_strings=3, max_length=3)
TASK = InContextConfig(automata=20, test_prompts=16, max_nodes=3, prompt=PROMPT)


def in_context(folder):
    return tiny_run(folder, model=LIGHT_MODEL, task=TASK, data=DataConfig(batch_size=8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineConfig(ModelConfig):
    """y = w x: no tokens, no state."""

    def build(self, rngs, compute_dtype=jnp.float32):
        return Line(rngs)


class Line(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((1,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoublingConfig(TaskConfig):
    """Learn y = 2 x."""

    products = ("answer.txt", "plots/answer.png")
    broken_from: int = 1000
    """First batch with numbers that are none."""

    def open(self, model, data):
        return Doubling(model, self)


class Doubling(Task):
    unit = "numbers"
    loss_label = "squared error"
    fingerprint = "doubling"

    def __init__(self, model, config):
        super().__init__(model)
        self.config = config

    def lines(self):
        return ["data       numbers"]

    def batches(self, split, *, batch_size, seed, process_index, process_count):
        def make(number):
            rng = np.random.default_rng([seed, number])
            bad = number >= self.config.broken_from
            return {"x": np.where(bad, np.nan, rng.random((batch_size, 3))).astype(np.float32)}

        return CountedBatches(make, process_index=process_index, process_count=process_count)

    def loss(self, model, batch, *, rngs=None):
        x = batch["x"]
        error = model.w * x - 2 * x
        total, size = jnp.sum(error**2), jnp.asarray(x.size, jnp.int32)
        aux = {"off": jnp.mean(jnp.abs(error)), "loss_none": jnp.zeros(())}
        return TaskLoss(total, size, aux)

    def finish(self, model, run, key):
        (run.folder / "answer.txt").write_text(f"{float(model.w[0]):.2f}")
        (run.folder / "plots" / "answer.png").write_bytes(b"png")
        return ["the answer"]


@pytest.fixture
def doubling(monkeypatch):
    """Register the two classes above for one test."""
    tasks, models = task_name.__self__, model_class.__self__
    monkeypatch.setitem(tasks._entries, "doubling", DoublingConfig)
    monkeypatch.setitem(models._entries, "line", LineConfig)


def line_run(folder, **task):
    config = tiny_run(folder, run={"steps": 12})
    return dataclasses.replace(
        config, model=LineConfig(), task=DoublingConfig(**task), data=DataConfig(batch_size=8)
    )


@pytest.mark.usefixtures("doubling")
def test_a_task_and_a_model_of_another_kind_train(tmp_path):
    config = line_run(tmp_path / "run")
    seen = []
    train(config, at_end=lambda *given: seen.append(given[1:]))
    got = {row["step"]: row for row in rows(config.run.folder)}
    names = {"loss", "off", "loss_none"}
    evaluated = {f"{prefix}_{name}" for prefix in ("val", "eval_train") for name in names}
    assert set(got[0]) == {"step", "tokens"} | evaluated
    assert set(got[3]) == {
        "step", "tokens", "train_loss", "lr", "grad_norm", "aux/off", "aux/loss_none",
    }  # fmt: skip
    assert got[12]["tokens"] == 12 * 8 * 3
    assert got[12]["val_off"] < got[0]["val_off"]
    log = (config.run.folder / "log.txt").read_text()
    assert "data       numbers" in log
    assert "val off " in log
    assert "numbers/s" in log
    assert "state  " not in log

    assert files(config.task) == ("plots/loss.png", "answer.txt", "plots/answer.png", "run.md")
    ((model, task),) = seen
    assert missing_products(config)
    assert make_products(config, None, model, task, command="x") == ["the answer"]
    assert not missing_products(config)
    card = (config.run.folder / "run.md").read_text()
    assert "![answer](plots/answer.png)" in card
    assert f"| validation off | {got[12]['val_off']:.4f} |" in card
    assert "validation loss | validation loss_none | validation off |" in card


@pytest.mark.usefixtures("doubling")
def test_a_bad_batch_of_any_task_is_described(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"Update 2 .* begins with x nan nan nan\."):
        train(line_run(tmp_path / "run", broken_from=2))


@pytest.mark.usefixtures("doubling")
def test_changed_data_of_a_generator_are_refused(tmp_path, monkeypatch):
    config = line_run(tmp_path / "run")
    train(with_run(config, steps=4))
    monkeypatch.setattr(Doubling, "fingerprint", "tripling")
    with pytest.raises(CheckpointMismatch, match="generator gives other examples"):
        train(config)


@pytest.mark.usefixtures("doubling")
def test_a_model_without_tokens_has_no_vocabulary():
    with pytest.raises(ConfigError, match="'line' reads no tokens, but the tokenizer has 7"):
        with_vocabulary(LineConfig(), 7, owner="tokenizer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = in_context(tmp_path_factory.mktemp("whole") / "run")
    train(config)
    return config


def test_a_killed_synthetic_run_equals_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    config = in_context(tmp_path / "run")
    update = Loop._update
    for step in (5, 8):  # after a checkpoint, and where one was just written

        def stopping(self, step=step):
            if self.step == step:
                raise KeyboardInterrupt
            update(self)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_update", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(config)
    assert train(config).stopped == "finished"
    assert rows(config.run.folder) == rows(whole.run.folder)
    want, got = (saved_arrays(c.run.folder, 12) for c in (whole, config))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_micro_batches_add_up_to_the_same_metrics(whole, tmp_path):
    parts = dataclasses.replace(whole.optim, accumulate=2)
    config = dataclasses.replace(in_context(tmp_path / "run"), optim=parts)
    config = dataclasses.replace(config, model=dataclasses.replace(LIGHT_MODEL, dropout=0.0))
    one = with_run(dataclasses.replace(config, optim=whole.optim), dir=str(tmp_path / "one"))
    for run in (one, config):
        train(with_run(run, steps=1, log_every=1))
    first, second = (rows(run.run.folder)[1] for run in (one, config))
    for name in ("train_loss", "grad_norm", "aux/accuracy", "aux/tvd"):
        np.testing.assert_allclose(second[name], first[name], rtol=1e-5)


def test_verbs_that_need_a_text_say_so_and_evaluate_repeats_the_training_numbers(whole, capsys):
    folder = str(whole.run.folder)

    def call(verb, *args):
        with pytest.raises(SystemExit) as stopped:
            cli.run(verb, ["--run", folder, *args])
        return stopped.value.code, *capsys.readouterr()

    code, _, err = call(sample.main)
    assert code == 2
    assert "in_context, makes its own data and has no tokenizer for other texts" in err
    for flag, value in (("--data-path", "a.txt"), ("--batch-size", "3")):
        code, _, err = call(evaluate.main, flag, value)
        assert code == 2
        assert f"{flag} {value}: the run's task makes its own data" in err
    code, out, _ = call(evaluate.main, "--which", "last")
    assert code == 0
    found = json.loads((whole.run.folder / "evaluate.json").read_text())
    row = rows(whole.run.folder)[-1]
    for name in ("loss", "accuracy", "tvd"):
        np.testing.assert_allclose(found[name], row[f"val_{name}"], rtol=1e-6)
        assert f"{found[name]:.4f}" in out


def test_json_round_trip_keeps_every_preset_and_with_them_every_task():
    kinds = set()
    for name in configs.names():
        config = configs.load(name)
        assert from_json(to_json(config)) == config
        kinds.add(to_dict(config)["task"]["kind"])
    assert kinds == set(task_names())


def test_config_of_an_older_version_is_a_decoder_on_text(tmp_path):
    config = tiny_run(tmp_path / "run")
    tree = to_dict(config)
    assert tree["model"].pop("kind") == "decoder"
    assert tree.pop("task")["kind"] == "language_modeling"
    assert from_json(json.dumps(tree)) == config
    assert config.task == LanguageModelingConfig()


def test_unknown_kinds_and_unregistered_classes_are_refused(tmp_path):
    tree = to_dict(tiny_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"Unknown task 'in_contxt'. Did you mean in_context"):
        from_json(json.dumps(tree | {"task": {"kind": "in_contxt"}}))
    with pytest.raises(ConfigError, match=r"Unknown model 'decodr'. Did you mean decoder"):
        from_json(json.dumps(tree | {"model": tree["model"] | {"kind": "decodr"}}))
    with pytest.raises(ConfigError, match="a task has no `kind`"):
        from_json(json.dumps(tree | {"task": {}}))
    with pytest.raises(ConfigError, match="LineConfig is no registered model"):
        to_json(RunConfig(model=LineConfig(), task=TASK))
    assert "decoder" in model_names()


def test_names_are_unique_and_misspelt_ones_get_a_hint():
    registry = Registry("thing", "jaxmem.tasks")

    @registry.register("alpha")
    class Alpha:
        pass

    with pytest.raises(ConfigError, match=r"Two things are called 'alpha'.*another name"):
        registry.register("alpha")(int)
    assert registry.names() == ["alpha"]
    assert registry.config_class("alpha") is Alpha
    assert registry.name_of(Alpha) == "alpha"
    with pytest.raises(UnknownName, match="Did you mean alpha"):
        registry.config_class("alpa")


def test_synthetic_tasks_take_the_batch_size_only(tmp_path):
    config = in_context(tmp_path / "run")
    assert config.data.batch_size == 8
    with pytest.raises(ConfigError, match=r"data\.path=x\.txt.*only `data\.batch_size` counts"):
        dataclasses.replace(config, data=DataConfig(path="x.txt", batch_size=8))


def test_counted_batches_remember_their_number():
    made = CountedBatches(lambda k: {"x": np.arange(4) + 10 * k}, process_index=1, process_count=2)
    next(made)
    state = json.loads(json.dumps(made.get_state()))
    np.testing.assert_array_equal(next(made)["x"], [11, 13])
    next(made)
    made.set_state(state)
    np.testing.assert_array_equal(next(made)["x"], [11, 13])
    assert jax.tree.leaves(made.get_state()) == [2]
