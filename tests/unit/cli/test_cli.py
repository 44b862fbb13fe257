"""The command line: listing, help, overrides, messages and exit codes."""

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys

import pytest

import configs
from experiments import cli, train
from experiments.listing import listing, mixers
from jaxmem.errors import DataError
from jaxmem.mixers.base import names as mixer_names
from jaxmem.training.config import diff, flatten, from_json, to_dict, to_json


def call(capsys, *args, verb=train.main):
    """Run a verb in this process; return exit code, stdout, and stderr without box drawing."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(verb, args)
    out, err = capsys.readouterr()
    return stopped.value.code, out, " ".join(err.replace("│", " ").split())


def printed_config(capsys, *args):
    code, out, err = call(capsys, *args, "--print-config")
    assert code == 0
    return from_json(out), err


def test_list_imports_nothing_heavy_and_takes_less_than_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "experiments.train", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "experiments.listing" in imported
    heavy = {"jax", "flax", "numpy", "tyro", "matplotlib", "cattrs", "rich", "grain", "orbax"}
    assert not heavy & imported
    # 0.06 s on an idle machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.stdout.strip() == listing()


def test_list_names_every_preset_and_every_registered_mixer():
    assert [entry.name for entry in mixers()] == mixer_names()
    assert all(entry.purpose for entry in mixers())
    text = listing()
    for name in configs.names():
        about = configs.describe(name)
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert about.purpose in line
        assert about.parameters in line
        assert about.time in line


def test_mixers_are_found_under_other_spellings_of_the_decorator(tmp_path):
    source = '@base.register("b", C)\nclass B:\n    """Second.\n\n    More.\n    """\n'
    source += '@register("a", C)\n@other\nclass A:\n    """First."""\n@plain("c")\nclass D: pass\n'
    (tmp_path / "family.py").write_text(source)
    assert mixers(tmp_path) == [("a", "First."), ("b", "Second.")]


def test_help_shows_every_field_with_the_value_of_this_preset(capsys):
    code, out, _ = call(capsys, "--config", "mm_tiny", "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    fields = flatten(to_dict(configs.load("mm_tiny")))
    for path in fields:
        if not path.endswith(".kind"):
            assert f"--{path.replace('_', '-')}" in text
    assert "Stored pairs per head and bank" in text
    assert "(default: 224)" in text
    assert "--model.positions {none,learned}" in text


def test_help_without_a_preset_says_how_to_name_one(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "--config NAME" in out
    assert "--print-config" in out


def test_print_config_is_json_that_can_be_given_back(capsys, tmp_path):
    overrides = ("--model.dim", "32", "--data.source", "auto", "--parallel.mesh", "data=2")
    config, err = printed_config(capsys, "--config", "mm_tiny", *overrides)
    preset = configs.load("mm_tiny")
    assert diff(preset, config) == [("model.dim", 64, 32), ("parallel.mesh", "", "data=2")]
    assert "model.dim: 64 -> 32" in err
    assert "data.source" not in err
    saved = tmp_path / "config.json"
    saved.write_text(to_json(config))
    again, err = printed_config(capsys, "--config", str(saved))
    assert again == config
    assert "no difference" in err


def test_mixer_is_replaced_and_shared_fields_are_kept(capsys):
    config, err = printed_config(
        capsys, "--config=gpt_shakespeare_char", "--mixer=contextual_memory"
    )
    preset = configs.load("gpt_shakespeare_char")
    assert config.model.mixer.num_heads == 6
    assert config.model.mixer.dropout == 0.2
    assert json.loads(to_json(config))["model"]["mixer"]["kind"] == "contextual_memory"
    assert dataclasses.replace(config.model, mixer=preset.model.mixer) == preset.model
    assert "model.mixer.kind: 'mha' -> 'contextual_memory'" in err


def test_a_python_file_is_a_preset(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses, configs\n"
        "config = dataclasses.replace(configs.load('gpt_tiny'), run=configs.load('mm_tiny').run)\n"
        "config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=''))\n"
    )
    config, _ = printed_config(capsys, "--config", str(path))
    assert config.run.name == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "mm_smal"], ["'mm_smal'", "mm_small", "--list"]),
        ([], ["--config NAME", "--list"]),
        (["--confg", "mm_tiny"], ["--config", "by --confg"]),
        (["--config"], ["--config needs a value"]),
        (["--config", "mm_tiny", "--config=gpt_tiny"], ["2 times", "mm_tiny, gpt_tiny"]),
        (["--config", "mm_tiny", "--mixer", "mah"], ["'mah'", "mha"]),
        (["--config", "mm_tiny", "--feed-forward=mlpp"], ["'mlpp'", "mlp"]),
        (["--config", "mm_tiny", "--model.dmi", "3"], ["--model.dmi", "--model.dim"]),
        (["--config", "mm_tiny", "--model.dim", "wide"], ["--model.dim", "'wide'"]),
        (
            ["--config", "mm_tiny", "--model.mixer.num-heads", "3"],
            ["model.mixer.num_heads=3", "model.dim=64"],
        ),
        (["--config", "mm_tiny", "--model.depth", "0"], ["model.depth=0"]),
        (["--config", "mm_tiny", "--optim.decay-steps", "9"], ["decay_steps=9", "warmup_steps=20"]),
        (["--config", "mm_tiny", "--optim.lr", "-1"], ["lr=-1.0", "Give another `--optim.lr`"]),
        (["--config", "mm_tiny", "--run.log-every", "0"], ["Give another `--run.log-every`"]),
        (["--config", "nowhere.json"], ["no file nowhere.json"]),
        (["--config", "nowhere.py"], ["no file nowhere.py"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_message_and_code_2(capsys, args, words):
    code, out, err = call(capsys, *args)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    for word in words:
        assert word in err


def test_messages_of_a_dataclass_and_of_the_parser_stay_on_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = "/".join(["folder"] * 20)
    tiny = ("--config", "mm_tiny")
    corpus = ("--data.source", "corpus", "--data.path", path)
    help_ = "`python -m experiments.train --config mm_tiny --help` shows every flag."
    for args, words in (
        (corpus, f"data.path={path!r}. Drop the path"),
        (("--run.steps", "abc"), f"--run.steps: found 'abc', expected a whole number. {help_}"),
        (("--optim.lr", "big"), f"--optim.lr: found 'big', expected a number. {help_}"),
        (("--run.stepss", "5"), f"--run.stepss, 5. Did you mean --run.steps? {help_}"),
        ((path,), f"Unrecognized options: {path}. {help_}"),
        (("--data.source", "txt"), "Did you mean text?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.run(train.main, [*tiny, *args])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err
        assert os.environ["COLUMNS"] == "40"


def test_a_run_shorter_than_the_warm_up_is_no_mistake(capsys):
    config, _ = printed_config(capsys, "--config", "mm_tiny", "--run.steps", "20")
    assert config.run.steps == config.optim.warmup_steps == 20


def test_a_replaced_mixer_is_named(capsys):
    _, err = printed_config(capsys, "--config", "mm_tiny", "--mixer", "mlp")
    assert "note: model.mixer: contextual_memory -> mlp" in err
    _, err = printed_config(capsys, "--config", "mm_tiny")
    assert "note:" not in err


def test_the_feed_forward_type_is_a_flag(capsys):
    gelu = ("--feed-forward", "mlp", "--model.feed-forward.hidden-mult", "2")
    config, err = printed_config(capsys, "--config", "two_mamba_2mamba_tiny", *gelu)
    assert "note: model.feed_forward: swiglu -> mlp" in err
    assert (config.model.feed_forward.hidden_mult, config.model.mixer.kernel) == (2, "pow2")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("c.json", "{", "not valid JSON"),
        ("c.json", "\xff", "is not UTF-8"),
        ("c.json", '{"model": {"dmi": 3}}', "dmi"),
        ("c.py", "confg = 3\n", "does not define `config"),
        ("c.py", "\nimport nowhere\n", "c.py, line 2: ModuleNotFoundError: No module named"),
        ("c.py", "a = 1\nb = (\n", "c.py, line 2: SyntaxError: '(' was never closed"),
        ("c.py", "def f():\n    return 1 / 0\n\nf()\n", "c.py, line 2: ZeroDivisionError: div"),
        ("c.py", "import configs\nconfigs.load('mm_smal')\n", "c.py, line 2: Unknown config"),
    ],
)
def test_broken_config_files_are_explained(capsys, tmp_path, name, text, word):
    path = tmp_path / name
    path.write_text(text, "latin-1")
    code, _, err = call(capsys, "--config", str(path))
    assert code == 2
    assert word in err
    assert name in err
    assert "Traceback" not in err
    assert err.count("error: ") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(KeyError, match="mm_smal"):
        cli.run(train.main, ["--config", "mm_smal", "--debug"])


def test_exit_codes(capsys):
    def fail(error):
        def verb(args):
            raise error

        return verb

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/log.txt")
    assert call(capsys, verb=fail(full)) == (
        2,
        "",
        "error: No space left on device (runs/x/log.txt). Free some space, or choose another "
        "folder (of a new run: --run.dir).",
    )
    assert call(capsys, verb=fail(DataError("No data."))) == (2, "", "error: No data.")
    assert call(capsys, verb=fail(KeyboardInterrupt()))[0] == 130
    assert call(capsys, verb=lambda args: 75)[0] == 75
    with pytest.raises(ZeroDivisionError):
        cli.run(fail(ZeroDivisionError()), [])
    with pytest.raises(OSError, match="loop"):
        cli.run(fail(OSError(errno.ELOOP, "loop")), [])
