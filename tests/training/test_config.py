"""The JSON form of a config, differences, and checks that span fields."""

import dataclasses
import json

import pytest

from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError
from jaxmem.mixers import base
from jaxmem.parallel.mesh import ParallelConfig
from jaxmem.training.config import RunConfig, RunOptions, diff, from_json, to_dict, to_json
from jaxmem.training.optim import OptimConfig
from tests.helpers.tiny_run import TINY_MODEL

CONFIG = RunConfig(model=TINY_MODEL, data=DataConfig(batch_size=8), run=RunOptions(dir="x"))


@pytest.mark.parametrize("name", base.names())
def test_json_round_trip_keeps_every_mixer(name):
    mixer = base.config_class(name)()
    for slot in ("mixer", "feed_forward"):
        model = dataclasses.replace(TINY_MODEL, dim=64, **{slot: mixer})
        config = dataclasses.replace(CONFIG, model=model)
        assert from_json(to_json(config)) == config
        assert to_dict(config)["model"][slot]["kind"] == name


def test_choices_in_two_lists_are_checked():
    model = dataclasses.replace(TINY_MODEL, dim=64, mixer=base.config_class("two_mamba")())
    tree = to_dict(dataclasses.replace(CONFIG, model=model))
    for choice in ("none", "discretize"):
        tree["model"]["mixer"]["decay"] = choice
        assert from_json(json.dumps(tree)).model.mixer.decay == choice
    tree["model"]["mixer"]["decay"] = "slow"
    with pytest.raises(ConfigError, match=r"slow.*decay"):
        from_json(json.dumps(tree))


def edited(path, value):
    tree = to_dict(CONFIG)
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[key]
    node[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.dmi", 3, r"extra fields found \(dmi\).*model"),
        ("model.mixer.kind", "mhaa", r"Unknown mixer 'mhaa'. Did you mean mha"),
        ("model.mixer.num_head", 2, r"extra fields found \(num_head\)"),
        ("run.precision", "float16", "float16"),
        ("optim.lr", "fast", "optim.lr"),
        ("optim.lr", -1.0, "optim.lr=-1.0"),
    ],
)
def test_bad_json_is_one_message_with_the_field(path, value, words):
    with pytest.raises(ConfigError, match=words) as err:
        from_json(edited(path, value), name="saved.json")
    assert str(err.value).startswith("saved.json")


def test_text_that_is_no_json():
    with pytest.raises(ConfigError, match=r"half\.json is not valid JSON"):
        from_json(to_json(CONFIG)[:40], name="half.json")


def test_diff_names_the_fields_that_differ():
    other = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(TINY_MODEL, depth=2),
        optim=OptimConfig(lr=0.5),
    )
    assert diff(CONFIG, other) == [("model.depth", 1, 2), ("optim.lr", 1e-3, 0.5)]
    assert diff(CONFIG, CONFIG) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": OptimConfig(accumulate=3)}, r"batch_size=8.*accumulate=3.*multiple of 3"),
        ({"parallel": ParallelConfig(mesh="data=3")}, r"batch_size=8.*3 devices.*'data=3'"),
        ({"optim": OptimConfig(decay_steps=80)}, r"optim.decay_steps=80.*warmup_steps=100"),
    ],
)
def test_fields_that_do_not_fit_together(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_run_options_are_checked_and_give_the_folder():
    with pytest.raises(ConfigError, match=r"run\.eval_every=0"):
        RunOptions(eval_every=0)
    with pytest.raises(ConfigError, match=r"run\.name.*run\.dir"):
        _ = RunOptions().folder
    assert str(RunOptions(name="a").folder) == "runs/a"
    assert str(RunOptions(name="a", dir="b").folder) == "b"
    assert RunOptions(eval_every=7).checkpoint_interval == 7
