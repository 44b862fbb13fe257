"""The other verbs: their mistakes, the doctor and the zoo."""

import dataclasses
import json
import tomllib
from pathlib import Path

import jax
import pytest

import configs
from experiments import cli, doctor, evaluate, sample, zoo
from jaxmem.data.config import DataConfig
from jaxmem.data.tokenizers import CharTokenizer
from jaxmem.mixers.base import names as mixer_names
from jaxmem.ops import dispatch
from jaxmem.tasks.language_modeling import LanguageModeling
from jaxmem.training.model import LoadedRun
from tests.unit.generate.stand_in import StandIn, StandInConfig

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def call(capsys, verb, *args):
    with pytest.raises(SystemExit) as stopped:
        cli.run(verb, args)
    out, err = capsys.readouterr()
    return stopped.value.code, out, " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("verb", [evaluate.main, sample.main], ids=["evaluate", "sample"])
def test_a_run_folder_is_needed_and_must_be_one(capsys, tmp_path, verb):
    code, _, err = call(capsys, verb)
    assert code == 2
    assert "--run" in err
    for folder in (tmp_path, tmp_path / "missing"):
        code, out, err = call(capsys, verb, "--run", str(folder))
        assert (code, out) == (2, "")
        assert f"{folder} is not a run folder" in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--temprature", "1"], "--temperature"),
        (["--which", "worst"], "best"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_sample_names_what_is_wrong(capsys, tmp_path, args, word):
    code, out, err = call(capsys, sample.main, "--run", str(tmp_path), *args)
    assert (code, out) == (2, "")
    assert word in err


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stand in for a run in `tmp_path / "run"` whose data are no longer where they were."""
    tokenizer = CharTokenizer("\nabcdefghij")
    preset = configs.load("mm_tiny")
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, context_len=12),
        data=DataConfig(source="text", path=str(tmp_path / "gone.txt"), batch_size=4),
    )
    model = StandIn(StandInConfig())
    task = LanguageModeling(config.model, config.data, tokenizer)
    run = LoadedRun(config=config, model=model, task=task, step=7)
    monkeypatch.setattr("jaxmem.training.model.load_run", lambda folder, checkpoint: run)
    (tmp_path / "run").mkdir()
    (tmp_path / "moved.txt").write_text("abcdefghij\n" * 60)
    return tmp_path


def test_evaluate_takes_data_that_were_moved(capsys, trained):
    args = (evaluate.main, "--run", str(trained / "run"))
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert "gone.txt" in err
    code, out, _ = call(capsys, *args, "--data-path", str(trained / "moved.txt"))
    assert code == 0
    found = json.loads((trained / "run" / "evaluate.json").read_text())
    assert f"{found['loss']:.4f}" in out


def test_evaluate_prints_what_it_cannot_write(capsys, trained):
    (trained / "run" / "evaluate.json").mkdir()  # also root cannot write there
    args = ("--run", str(trained / "run"), "--data-path", str(trained / "moved.txt"))
    code, out, err = call(capsys, evaluate.main, *args)
    assert code == 0
    assert "perplexity" in out
    assert err.startswith(f"note: {trained / 'run' / 'evaluate.json'} could not be written: ")


def test_a_run_on_the_default_corpus_can_be_evaluated_on_a_file(tmp_path):
    moved = evaluate._moved(DataConfig(source="corpus"), tmp_path)
    assert (moved.source, moved.path) == ("auto", str(tmp_path))


def test_prompts_come_from_flags_and_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    options = sample.SampleOptions(run=tmp_path, prompt=("a", ""), prompt_file=path)
    assert sample._prompts(options) == ["a", "", "one", "two"]
    assert sample._prompts(sample.SampleOptions(run=tmp_path)) == [""]


@pytest.fixture
def no_cache(monkeypatch):
    """Keep the doctor from turning on the compilation cache of the whole test process."""
    monkeypatch.setattr("jaxmem.cache.enable_compilation_cache", lambda: None)


@pytest.mark.usefixtures("no_cache")
def test_doctor_reports_and_passes(capsys, monkeypatch):
    # One program for each form of an op instead of one for each of its operations.
    tests = {name: compiled(run) for name, run in doctor.self_tests().items()}
    monkeypatch.setattr(doctor, "self_tests", lambda: tests)
    code, out, _ = call(capsys, doctor.main)
    for word in ("jaxmem", "jax 0", "devices", "leaky_average: xla", "attention: xla", "corpus"):
        assert word in out
    assert out.count(": ok") == 8
    assert code == 0


def compiled(run):
    return lambda form: jax.jit(lambda: run(form))()


def test_doctor_knows_every_op_and_every_extra_of_users():
    ops = {line.partition(":")[0] for line in dispatch.explain_all()}
    assert set(doctor.self_tests()) == ops
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    developers = {"dev", "lint", "docs"}
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - developers


@pytest.mark.usefixtures("no_cache")
def test_doctor_reports_a_wrong_and_a_crashing_op(capsys, monkeypatch):
    def crash(form):
        raise TypeError("no such thing")

    tests = {"wrong": lambda form: len(form), "nan": lambda form: float("nan"), "crash": crash}
    monkeypatch.setattr(doctor, "self_tests", lambda: tests)
    code, out, _ = call(capsys, doctor.main)
    assert code == 1
    assert out.count("FAILED") == 3
    assert "TypeError: no such thing" in out


def test_zoo_has_a_row_per_mixer(capsys):
    code, out, _ = call(capsys, zoo.main)
    assert code == 0
    rows = [line.split("|")[1].strip(" `") for line in out.splitlines() if line.startswith("| `")]
    assert rows == mixer_names()
    mha = next(line for line in out.splitlines() if line.startswith("| `mha`"))
    # Keys and values, 512 wide, 4 bytes, for 1024 tokens; counters come on top.
    assert "4.0 MiB / 64.1 MiB" in mha
    assert "`gpt_tiny`" in mha
    assert "`mm_tiny`" not in mha
