"""Runs side by side: their table, what differs, means over seeds, and the figure."""

import csv
import dataclasses
import io

import pytest

from jaxmem.reports.runs_report import group, read_run, write_report
from tests.helpers.run_folders import run_config, write_run


def wider(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dim=32))


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one configuration, and one run of another."""
    folders = [
        write_run(run_config(tmp_path / "gpt_0", seed=0), {0: 4.0, 10: 3.0, 20: 2.0}),
        write_run(run_config(tmp_path / "gpt_1", seed=1), {0: 4.0, 20: 2.5}, val_accuracy=0.75),
        write_run(wider(run_config(tmp_path / "wide_0", seed=0)), {0: 4.0, 10: 1.0, 20: 1.5}),
    ]
    return [read_run(folder) for folder in folders]


def test_seeds_are_put_together_and_named_without_them(runs):
    groups = group(runs)
    assert [(one.label, len(one.runs)) for one in groups] == [("gpt", 2), ("wide_0", 1)]


def test_a_repeated_seed_is_no_second_seed(runs, tmp_path):
    again = read_run(write_run(run_config(tmp_path / "x" / "gpt_0"), {0: 4.0, 20: 2.0}))
    groups = group([*runs, again])
    assert [len(one.runs) for one in groups] == [2, 1, 1]
    # Two runs of one name are told apart by their paths.
    assert "gpt_0" in groups[2].label
    assert write_report([runs[0], again], tmp_path / "out", "").count(f"| {again.folder} |") == 1


def test_report_has_results_differences_and_means(runs, tmp_path):
    from matplotlib.image import imread

    out = tmp_path / "new" / "out"
    table = write_report(runs, out, "python -m x")
    text = (out / "report.md").read_text()
    assert text.startswith("```\npython -m x\n```")
    assert table in text
    machine = "2 s | 100 | 1 x cpu, jax 1.2.3 |"
    assert f"| gpt_1 | 1 | 20 | 200 | 2.5000 | 2.5000 | 20 | 0.7500 | {machine}" in table
    assert f"| wide_0 | 0 | 20 | 200 | 1.5000 | 1.0000 | 10 |  | {machine}" in table
    assert (
        "| field | gpt | wide_0 |\n| --- | --- | --- |\n| `model.dim` | `64` | `32` |\n\n" in text
    )
    assert "| updates | gpt, 2 seeds | wide_0 |" in text
    assert "| 10 |  | 1.0000 |" in text  # one of two seeds was not evaluated there
    # 12.706 * 0.35355 / sqrt 2
    assert "| 20 | 2.2500 ± 3.1766 | 1.5000 |" in text
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert [row["run"] for row in rows] == ["gpt_0", "gpt_1", "wide_0"]
    assert rows[1]["metrics"] == '{"val_accuracy": 0.75}'
    assert (rows[2]["best_val_loss"], rows[2]["best_step"]) == ("1.0", "10")
    pixels = imread(out / "report.png")
    for colour in ((31, 119, 180), (255, 127, 14)):  # one per group
        drawn = abs(pixels[..., :3] * 255 - colour).max(-1) < 3
        assert drawn.sum() > 200


def test_one_run_alone_differs_from_nothing(runs, tmp_path):
    write_report(runs[:1], tmp_path, "")
    text = (tmp_path / "report.md").read_text()
    assert "What differs" not in text
    assert "Mean over seeds" not in text
    assert "| 20 | 2.0000 |" in text


def test_a_run_that_has_just_begun_is_shown(tmp_path):
    folder = write_run(run_config(tmp_path / "run", steps=30), {0: 4.0, 20: 2.0})
    assert "| run | 0 | 20 of 30 |" in write_report([read_run(folder)], tmp_path / "out", "")
    (folder / "metrics.jsonl").unlink()
    assert "| run | 0 | 0 of 30 |  |" in write_report([read_run(folder)], tmp_path / "out", "")
