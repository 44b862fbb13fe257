"""What a sweep writes: rows of runs and cells, failures, the published order, the figure."""

import csv
import io

import pytest

from jaxmem.reports.sweep import csv_text, read_outcome, summary, write_results
from jaxmem.reports.sweep_suite import Cell, Suite
from tests.helpers.run_folders import run_config, write_run

A = Cell(label="a", preset="gpt_tiny", published=30.0)
B = Cell(label="b", preset="gpt_tiny", overrides="--model.dim 32", published=20.0)
SUITE = Suite(cells=(A, B), seeds=(0, 1))


def outcome(tmp_path, cell, seed, losses=None, error="", steps=20, **last):
    folder = tmp_path / f"{cell.label}_{seed}"
    if losses:
        write_run(run_config(folder, seed=seed), losses, **last)
    return read_outcome(
        cell,
        seed,
        metric="val_loss",
        steps=steps,
        folder=folder,
        command=f"train {folder.name}",
        finished=bool(losses),
        error=error,
    )


@pytest.fixture
def outcomes(tmp_path):
    return [
        outcome(tmp_path, A, 0, {0: 4.0, 20: 2.0}),
        outcome(tmp_path, A, 1, {0: 4.0, 20: 2.5}),
        outcome(tmp_path, B, 0, {0: 4.0, 20: 1.0}),
        outcome(tmp_path, B, 1, error="out of | memory"),
    ]


def test_results_are_written_as_table_rows_and_figure(tmp_path, outcomes):
    from matplotlib.image import imread

    out = tmp_path / "out"
    write_results(out, SUITE, outcomes, "python -m x")
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"]
    assert [row["value"] for row in rows] == ["2.0", "2.5", "1.0", ""]
    assert rows[3]["error"] == "out of | memory"
    assert (rows[0]["step"], rows[0]["tokens"], rows[0]["seconds"]) == ("20", "200", "2.0")
    assert rows[0]["machine"] == "1 x cpu, jax 1.2.3"
    assert rows[0]["command"] == "train a_0"
    text = (out / "results.md").read_text()
    # 2.25 ± 12.706 * 0.35355 / sqrt 2; the cell with one seed left has no interval.
    train = "`python -m experiments.train --config gpt_tiny"
    machine = "1 x cpu, jax 1.2.3"
    assert f"| a | 2.2500 | -0.9266 to 5.4266 | 30 | 2 of 2 | 2 s | {machine} | {train}` |" in text
    assert f"| b | 1.0000 |  | 20 | 1 of 2, 1 failed | 2 s | {machine} | {train} --model.d" in text
    assert "| b | 1 | out of \\| memory | `train b_1` |" in text
    assert text.startswith("```\npython -m x\n```")
    pixels = imread(out / "results.png")
    assert pixels[..., :3].std() > 0


def test_summary_says_the_failures_and_the_published_order(outcomes):
    text = summary(SUITE, outcomes)
    assert "failed: b, seed 1: out of | memory" in text
    assert "- paper, best first: b 20, a 30\n- ours, best first: b 1, a 2.25" in text
    assert text.endswith("- of 1 published orders of two cells: 0 agree, 0 disagree, 1 undecided")
    assert "experiments.train" not in text


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (-1.0, "1 agree, 0 disagree, 0 undecided"),
        (1.0, "1 disagree, 0 undecided\n- the other way round here: b before a"),
        (0.0, "1 undecided\n- undecided, the intervals overlap: b before a"),
    ],
    ids=["agree", "disagree", "undecided"],
)
def test_orders_that_are_not_as_published_are_named(tmp_path, shift, said):
    losses = {A: (2.0, 2.001), B: (2.0 + shift, 2.001 + shift)}
    found = [
        outcome(tmp_path, cell, seed, {20: losses[cell][seed]})
        for cell in (A, B)
        for seed in (0, 1)
    ]
    assert summary(SUITE, found).endswith(said)


def test_without_numbers_of_a_paper_nothing_is_compared(tmp_path, outcomes):
    cells = (Cell(label="a", preset="gpt_tiny"), Cell(label="b", preset="gpt_tiny"))
    suite = Suite(cells=cells, seeds=(0, 1))
    assert "published" not in summary(suite, outcomes)
    write_results(tmp_path / "out", suite, outcomes[:2], "")
    assert "## Beside" not in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_loss": None}, "no 'val_loss' after the last update; there are step, tokens"),
        ({"val_loss": float("nan")}, "val_loss is nan"),
        ({"step": 30}, "holds a run of 30 updates, the suite asks for 20"),
    ],
    ids=["absent", "nan", "longer"],
)
def test_a_run_without_the_number_that_is_asked_for_failed(tmp_path, change, words):
    found = outcome(tmp_path, A, 0, {0: 4.0, 20: 2.0}, **change)
    assert (found.status, found.value) == ("failed", None)
    assert words in found.error


def test_a_run_that_is_not_there_is_open(tmp_path):
    found = outcome(tmp_path, A, 0)
    assert (found.status, found.value, found.step, found.machine) == ("open", None, None, "")
    assert csv_text([]) == ""
