"""The comparison of presets over seeds: what the table says, and that the figure shows it."""

import json
import sys

import pytest

from benchmarks import compare
from benchmarks.compare import Curves, curve, order, report, words

FIRST = Curves("a", "val_tvd", [{0: 0.9, 10: 0.2, 20: 0.1}, {0: 0.8, 10: 0.4}])
SECOND = Curves("b", "val_tvd", [{0: 0.85, 10: 0.5}, {0: 0.85, 10: 0.7}])


def test_table_has_mean_deviation_and_verdict():
    text = report([FIRST, SECOND], "python -m x", 2)
    assert "```\npython -m x\n```" in text
    assert "## validation tvd" in text
    assert "| updates | a | b | every seed of the first is |" in text
    assert "| 0 | 0.8500 ± 0.0707 | 0.8500 ± 0.0000 |  |" in text
    assert "| 10 | 0.3000 ± 0.1414 | 0.6000 ± 0.1414 | below |" in text
    assert "| 20 |" not in text  # one seed was not evaluated there
    one = report([Curves("a", "val_loss", [{0: 1.0}])], "", 1)
    assert "| 0 | 1.0000 |" in one
    assert "deviation" not in one


def test_order_and_words():
    assert order([3, 4], [1, 2]) == "above"
    assert order([1, 4], [2, 3]) == ""
    assert words("eval_train_loss") == "evaluated train loss"
    assert words("aux/accuracy") == "training accuracy"


def test_a_metric_that_was_never_written_is_named(tmp_path):
    row = {"step": 0, "val_loss": 1.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert curve(tmp_path, "val_loss") == {0: 1.5}
    with pytest.raises(SystemExit, match="no 'val_tvd'"):
        curve(tmp_path, "val_tvd")


def test_every_preset_and_seed_is_trained_and_drawn(tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread

    calls = []

    def run(command, **_):
        calls.append(command)
        folder = tmp_path / "runs" / f"{command[4]}_{command[8]}"
        folder.mkdir(parents=True)
        rows = [{"step": step, "val_loss": 3.0 - step / 10, "val_tvd": 0.5} for step in (0, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    monkeypatch.setattr(compare.subprocess, "run", run)
    args = ["a", "b", "--metrics", "val_loss", "val_tvd", "--seeds", "1", "2"]
    args += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out" / "x")]
    monkeypatch.setattr(sys, "argv", ["compare", *args, "--", "--run.steps", "10"])
    compare.main()
    assert [(c[4], c[8]) for c in calls] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert all(c[-2:] == ["--run.steps", "10"] for c in calls)
    text = (tmp_path / "out" / "x.md").read_text()
    assert text.startswith("```\npython -m benchmarks.compare a b --metrics")
    assert text in capsys.readouterr().out + "\n"
    pixels = imread(tmp_path / "out" / "x.png")
    assert pixels.shape[0] > 400
    assert pixels[..., :3].std() > 0
