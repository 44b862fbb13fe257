"""The verbs sweep and report: their suites, their mistakes, and a cell that makes no config."""

import csv
import io
import re

import pytest

import configs
from configs import suites
from experiments import cli, report, sweep
from experiments.listing import listing
from jaxmem.errors import UnknownName
from jaxmem.training.config import RunConfig
from tests.helpers.run_folders import run_config, write_run

HEAD = "from jaxmem.reports.sweep_suite import Cell, Suite\n"


def call(capsys, verb, *args):
    with pytest.raises(SystemExit) as stopped:
        cli.run(verb, list(map(str, args)))
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_is_described_and_each_of_its_cells_makes_a_config(name):
    about = suites.describe(name)
    assert about.purpose.endswith(".")
    assert about.time
    assert re.search(rf"^  {name} .*{re.escape(about.purpose)}", listing(), re.MULTILINE)
    for cell in suites.load(name).cells:
        parsed = cli.parse_run(["--config", cell.preset, *cell.flags], "train")
        assert isinstance(parsed.config, RunConfig)


def test_suites_are_no_presets():
    assert not set(suites.names()) & set(configs.names())
    with pytest.raises(UnknownName, match="smoke"):
        suites.describe("smoek")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--suite", "smoek"], ["'smoek'", "Did you mean smoke?"]),
        ([], ["Missing: --suite"]),
        (["--suite", "nowhere.py"], ["no file nowhere.py"]),
        (["--suite", "smoke", "--jobs", "0"], ["--jobs 0"]),
        (["--suite", "smoke", "--only", "mamba*"], ["'mamba*'", "labels are mosaic, gpt"]),
        (["--suite", "smoke", "--outt", "x"], ["--out"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_of_sweep_get_one_line_and_code_2(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, sweep.main, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("suit = 3\n", "does not define `suite = Suite(...)`"),
        (HEAD + "suite = Suite(cells=(), seeds=(0,))\n", "s.py, line 2: A suite needs"),
    ],
)
def test_broken_suite_files_are_explained(capsys, tmp_path, text, word):
    (tmp_path / "s.py").write_text(text)
    code, _, err = call(capsys, sweep.main, "--suite", tmp_path / "s.py")
    assert code == 2
    assert word in err
    assert err.count("\n") == 1


def test_the_folder_of_a_sweep_may_not_be_a_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = call(capsys, sweep.main, "--suite", "smoke", "--out", tmp_path / "file")
    assert (code, "is a file" in err) == (2, True)


def test_cells_that_make_no_config_are_rows(capsys, tmp_path, monkeypatch):
    """Nothing can be trained here, so nothing is started."""
    monkeypatch.setattr("jaxmem.reports.sweep_runner.subprocess.Popen", None)
    (tmp_path / "s.py").write_text(
        f"{HEAD}suite = Suite(seeds=(7,), cells=(\n"
        "    Cell(label='typo', preset='gpt_tiny', overrides='--model.dmi 3'),\n"
        "    Cell(label='name', preset='gpt_tin'),\n))\n"
    )
    code, out, _ = call(capsys, sweep.main, "--suite", tmp_path / "s.py", "--out", tmp_path / "o")
    assert code == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "o" / "results.csv").read_text())))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "--model.dim" in rows[0]["error"]
    assert "Unknown config 'gpt_tin'" in rows[1]["error"]
    assert "failed: name, seed 7: Unknown config" in out
    assert "| typo | 7 | Unrecognized" in (tmp_path / "o" / "results.md").read_text()


def test_only_takes_labels_runs_and_patterns(tmp_path):
    suite = suites.load("smoke")
    plan = [one for cell in suite.cells for one in sweep._planned(cell, suite, tmp_path)]
    names = {
        pattern: [one.folder.name for one in sweep._chosen(plan, pattern)]
        for pattern in ("gpt", "mosaic_1", "*_0", None)
    }
    assert names["gpt"] == ["gpt_0", "gpt_1"]
    assert names["mosaic_1"] == ["mosaic_1"]
    assert names["*_0"] == ["mosaic_0", "gpt_0"]
    assert len(names[None]) == 4
    assert [one.config.run.seed for one in plan] == [0, 1, 0, 1]


def test_report_refuses_what_is_no_run_folder(capsys, tmp_path):
    run = write_run(run_config(tmp_path / "run"), {0: 4.0, 20: 2.0})
    for folder in (tmp_path, tmp_path / "missing", run / "config.json"):
        code, out, err = call(capsys, report.main, run, folder, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {folder} is not a run folder")
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "results.csv").touch()
    assert f"Give {tmp_path / 'runs'}/*." in call(capsys, report.main, tmp_path)[2]
    code, _, err = call(capsys, report.main)
    assert (code, "No run folder is named" in err) == (2, True)
    code, _, err = call(capsys, report.main, run, "--out", run / "config.json")
    assert (code, "is a file" in err) == (2, True)


def test_report_takes_each_folder_once(capsys, tmp_path):
    run = write_run(run_config(tmp_path / "run"), {0: 4.0, 20: 2.0})
    out = tmp_path / "out"
    code, shown, _ = call(capsys, report.main, run, tmp_path / "." / "run", "--out", out)
    assert code == 0
    assert shown.count("| run |") == 2  # the head and one row
    assert {path.name for path in out.iterdir()} == {"report.md", "report.csv", "report.png"}
