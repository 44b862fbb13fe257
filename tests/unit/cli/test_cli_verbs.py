"""The other verbs: their mistakes, the doctor and the zoo."""

import pytest

from experiments import cli, doctor, evaluate, sample, zoo
from jaxmem.mixers.base import names as mixer_names


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
def test_doctor_reports_and_passes(capsys):
    code, out, _ = call(capsys, doctor.main)
    for word in ("jaxmem", "jax 0", "devices", "leaky_average: xla", "attention: xla", "corpus"):
        assert word in out
    assert out.count(": ok") == 2
    assert code == 0


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
