"""The presets: their docstrings against what they build, and the published constants."""

import dataclasses
from pathlib import Path

import pytest

import configs
from jaxmem.backbones.base import with_vocabulary
from jaxmem.errors import UnknownName
from jaxmem.tasks.language_modeling import LanguageModelingConfig
from tests.helpers.parameter_count import parameter_count

# Characters of the default corpus; tiny Shakespeare, which the papers use, has 65.
CORPUS_CHARACTERS, TINY_SHAKESPEARE = 83, 65
STORIES_CHARACTERS = 24


def parameters(name, vocab_size):
    config = configs.load(name)
    if isinstance(config.task, LanguageModelingConfig):
        model = with_vocabulary(config.model, vocab_size, owner="tokenizer")
    else:
        model = config.task.open(config.model, config.data).model
    return parameter_count(model)


@pytest.mark.parametrize("name", configs.names())
def test_preset_is_short_and_fully_described(name):
    about = configs.describe(name)
    assert about.purpose.endswith(".")
    assert all(about)
    assert 10 <= len(Path(configs.__file__).with_name(f"{name}.py").read_text().splitlines()) <= 40
    config = configs.load(name)
    assert config.run.name == name
    assert config.run.folder == Path("runs") / name
    number, _, millions = about.parameters.partition(" ")
    stated = float(number) * (1e6 if millions == "M" else 1)
    characters = STORIES_CHARACTERS if config.data.source == "stories" else CORPUS_CHARACTERS
    assert parameters(name, characters) == pytest.approx(stated, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mm_small", 796_016),
        ("gpt_small", 804_096),
        ("mm_shakespeare_char", 10_647_036),
        ("gpt_shakespeare_char", 10_745_088),
        ("mm_gpt2", 123_588_336),
        ("mm_354m", 353_554_048),
        ("mm_756m", 756_822_144),
        ("icll_mm_paper", 396_528),
    ],
)
def test_parameter_counts_equal_the_authors(name, published):
    assert parameters(name, TINY_SHAKESPEARE) == published


@pytest.mark.parametrize("size", ["tiny", "small", "shakespeare_char"])
def test_twins_differ_in_the_model_only(size):
    mosaic, gpt = configs.load(f"mm_{size}"), configs.load(f"gpt_{size}")
    assert (mosaic.data, mosaic.optim) == (gpt.data, gpt.optim)
    assert dataclasses.replace(mosaic.run, name=gpt.run.name) == gpt.run
    sizes = ("context_len", "dim", "depth", "dropout")
    assert all(getattr(mosaic.model, s) == getattr(gpt.model, s) for s in sizes)


@pytest.mark.parametrize("size", ["", "_tiny"])
def test_in_context_twins_are_of_one_size(size):
    mosaic, gpt = configs.load(f"icll_mm{size}"), configs.load(f"icll_gpt{size}")
    assert (mosaic.task, mosaic.data, mosaic.optim) == (gpt.task, gpt.data, gpt.optim)
    assert dataclasses.replace(mosaic.run, name=gpt.run.name) == gpt.run
    assert mosaic.run.eval_batches * mosaic.data.batch_size == mosaic.task.test_prompts
    counts = [parameters(f"icll_{kind}{size}", 0) for kind in ("mm", "gpt")]
    assert counts[0] == pytest.approx(counts[1], rel=2e-3)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownName, match="mm_tiny"):
        configs.describe("mm_tini")
    with pytest.raises(UnknownName, match="mm_tiny"):
        configs.load("mm_tini")


def test_description_joins_lines_of_a_paragraph(tmp_path, monkeypatch):
    text = '"""Purpose.\n\nSource: one\ntwo: three.\nTime: now\n\nNot part of it.\n"""\n'
    (tmp_path / "x.py").write_text(text)
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(configs, "_FOLDER", tmp_path)
    assert configs.names() == ["x"]
    about = configs.describe("x")
    assert (about.purpose, about.source, about.time) == ("Purpose.", "one two: three.", "now")
    assert (about.parameters, about.result) == ("", "")
