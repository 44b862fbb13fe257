"""The verb `sample`, drawing and with beams: what it prints, and what it refuses."""

import re

import pytest

import configs
from experiments import cli, sample
from jaxmem.data.tokenizers import CharTokenizer
from jaxmem.generate.text import search_text
from tests.unit.generate.stand_in import StandIn, StandInConfig

TOKENIZER = CharTokenizer("\nabcdefghij")


class Run:
    """As much of a loaded run as sampling uses."""

    config = configs.load("mm_tiny")
    model = StandIn(StandInConfig())
    tokenizer = TOKENIZER


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxmem.training.model.load_run", lambda folder, checkpoint: Run)

    def run(*args):
        with pytest.raises(SystemExit) as stopped:
            cli.run(sample.main, ["--run", str(tmp_path), "--max-new-tokens", "8", *args])
        out, err = capsys.readouterr()
        return stopped.value.code, out, " ".join(err.split())

    return run


def search(prompt, **kwargs):
    return search_text(Run.model, TOKENIZER, prompt, beams=3, max_new_tokens=8, **kwargs)


def test_several_samples_of_several_prompts_and_the_first_one_alone(call):
    args = ("--prompt", "ab", "--seed", "3")
    code, out, _ = call(*args, "--prompt", "", "--num-samples", "2")
    titles = [f"--- prompt {p}, sample {s} ---" for p in (1, 2) for s in (1, 2)]
    assert (code, re.findall("--- .* ---", out)) == (0, titles)
    code, alone, _ = call(*args)
    assert (code, len(alone)) == (0, len("ab") + 8 + len("\n"))
    assert f"{titles[0]}\n{alone}\n{titles[1]}\n" in out  # a row of a batch equals itself alone


def test_the_likeliest_text_is_printed_alone(call):
    code, out, _ = call("--prompt", "ab", "--beams", "3")
    assert (code, out) == (0, f"ab{search('ab')[0]}\n")


def test_several_places_of_several_prompts(call):
    args = ("--prompt", "ab", "--prompt", "c", "--num-samples", "2", "--length-power", "1")
    code, out, _ = call(*args, "--beams", "3", "--stop", "d")
    wanted = ""
    for number, prompt in enumerate(("ab", "c"), start=1):
        for place, text in enumerate(search(prompt, length_power=1.0, stop=["d"])[:2], start=1):
            wanted += f"--- prompt {number}, place {place} ---\n{prompt}{text}\n\n"
    assert (code, out) == (0, wanted)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--beams", "2", "--num-samples", "3"], "--beams 2 cannot find --num-samples 3"),
        (["--beams", "-1"], "--beams -1 cannot find"),
        (["--beams", "2", "--stop", "ab"], "stop string 'ab' takes 2 tokens"),
        (["--beams", "2", "--length-power", "-1"], "length_power=-1.0"),
    ],
)
def test_what_is_refused(call, args, words):
    code, out, err = call("--prompt", "a", *args)
    assert (code, out) == (2, "")
    assert words in err
