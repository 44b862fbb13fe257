"""The verb that exports a run, and its mistakes."""

import dataclasses

import pytest
from flax import nnx
from safetensors.numpy import load_file

import configs
from experiments import cli, export
from jaxmem.backbones.decoder import Decoder
from jaxmem.interop.weights import load_weights
from jaxmem.training.model import LoadedRun


def call(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        cli.run(export.main, args)
    out, err = capsys.readouterr()
    return stopped.value.code, out, " ".join(err.split())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stand in for a run in `tmp_path / "run"`."""
    preset = configs.load("mm_tiny")
    model = Decoder(dataclasses.replace(preset.model, vocab_size=11), rngs=nnx.Rngs(0))
    run = LoadedRun(config=preset, model=model, task=None, step=7)
    monkeypatch.setattr("jaxmem.training.model.load_run", lambda folder, checkpoint: run)
    return tmp_path


def test_a_run_is_exported_by_the_authors_names(capsys, trained):
    path = trained / "w.safetensors"
    code, out, _ = call(capsys, "--run", str(trained / "run"), "--out", str(path))
    assert code == 0
    assert "names of nano_mosaic" in out
    assert "step 7" in out
    assert f"{len(load_file(path))} tensors" in out
    preset = configs.load("mm_tiny").model
    assert load_weights(Decoder(dataclasses.replace(preset, vocab_size=11), rngs=nnx.Rngs(1)), path)


@pytest.mark.parametrize(
    ("out", "args", "words"),
    [
        ("w.safetensors", ["--names", "gtp"], "Unknown family of weights 'gtp'. Did you mean gpt?"),
        ("w.safetensors", ["--names", "gpt"], "model.mixer is contextual_memory instead of mha"),
        (".", [], "is a folder"),
        ("missing/w.safetensors", [], "in one that is not there"),
    ],
    ids=["misspelt", "other", "folder", "nowhere"],
)
def test_mistakes_are_one_message(capsys, trained, out, args, words):
    code, shown, err = call(capsys, "--run", str(trained), "--out", str(trained / out), *args)
    assert (code, shown) == (2, "")
    assert words in err


def test_a_run_folder_is_needed(capsys, tmp_path):
    code, _, err = call(capsys, "--run", str(tmp_path), "--out", str(tmp_path / "w.safetensors"))
    assert code == 2
    assert "is not a run folder" in err
