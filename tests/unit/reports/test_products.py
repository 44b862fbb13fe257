"""The products of a run: metrics read back, the plot, the card, the samples, tables."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import configs
from jaxmem.data.tokenizers import CharTokenizer
from jaxmem.reports.card import parameter_checksum, run_card
from jaxmem.reports.plots import loss_plot
from jaxmem.reports.products import files, make_products, missing_products
from jaxmem.reports.runs import read_environment, read_metrics
from jaxmem.reports.tables import markdown_table
from jaxmem.tasks.language_modeling import LanguageModeling
from jaxmem.training.console import human_bytes
from tests.unit.generate.stand_in import StandIn, StandInConfig

ROWS = [
    {"step": 0, "tokens": 0, "val_loss": 4.2, "eval_train_loss": 4.1, "seconds": 0.5},
    {"step": 10, "tokens": 640, "train_loss": 3.0, "tokens_per_s": 1000.0, "seconds": 1.0},
    {"step": 20, "tokens": 1280, "train_loss": 2.0, "val_loss": 1.5, "eval_train_loss": 1.25},
    {"step": 30, "tokens": 1920, "train_loss": 1.9, "val_loss": 1.75, "seconds": 2.0},
]


@pytest.fixture
def model():
    return StandIn(StandInConfig())


@pytest.fixture
def config(tmp_path):
    preset = configs.load("mm_tiny")
    run = dataclasses.replace(preset.run, dir=str(tmp_path), samples=2, sample_tokens=5)
    return dataclasses.replace(preset, run=run)


def text_task(config, characters):
    return LanguageModeling(config.model, config.data, CharTokenizer(characters))


def test_metrics_without_the_line_that_a_kill_cut_short(tmp_path):
    assert read_metrics(tmp_path) == []
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path) == ROWS
    (tmp_path / "metrics.jsonl").write_text(text[:-5])
    assert read_metrics(tmp_path) == ROWS[:-1]
    assert read_environment(tmp_path) == {}


def test_broken_lines_of_metrics_are_left_out_with_a_note(tmp_path, capsys):
    lines = [json.dumps(ROWS[0]), '{"step": 1', "\0\0", "3", "{}", json.dumps(ROWS[1])]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    assert read_metrics(tmp_path) == ROWS[:2]
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" is ")[0] for note in notes] == [
        f"note: {path}, line {number}" for number in (2, 3, 4, 5, 7)
    ]


@pytest.mark.parametrize("rows", [ROWS, []], ids=["run", "no-rows"])
def test_plot_is_a_picture_with_the_curves(tmp_path, rows):
    from matplotlib.image import imread

    path = tmp_path / "new" / "loss.png"
    loss_plot(rows, path, title="a run")
    pixels = imread(path)
    assert pixels.shape[:2] == (540, 840)
    orange = np.array([255, 127, 14]) / 255  # the colour of the validation curve
    drawn = (abs(pixels[..., :3] - orange) < 0.02).all(-1).sum()
    assert drawn > 200 if rows else drawn == 0


def test_checksum_depends_on_every_parameter_only(model):
    first = parameter_checksum(model)
    assert first == parameter_checksum(StandIn(StandInConfig()))
    place = np.array(model.place[...])
    place[3, 2] += 1e-6
    model.place[...] = place
    assert parameter_checksum(model) != first


def test_card_states_result_difference_and_environment(config, model):
    preset = configs.load("mm_tiny")
    text = run_card(
        config,
        preset,
        command="python -m x",
        environment={"jax": "1.2", "git_revision": None},
        rows=ROWS,
        model=model,
    )
    for part in (
        "# mm_tiny\n",
        "```\npython -m x\n```",
        "| validation loss | 1.7500 |",
        "| best validation loss | 1.5000 at update 20 |",
        "| 20 | 1,280 | 1.2500 | 1.5000 |",
        "| tokens/s, median | 1,000 |",
        "| `run.samples` | `3` | `2` |",
        "| jax | 1.2 |",
        "| git_revision | null |",
        parameter_checksum(model),
        "plots/loss.png",
    ):
        assert part in text
    unchanged = run_card(preset, preset, command="", environment={}, rows=[], model=model)
    assert "The preset, unchanged." in unchanged
    assert "never evaluated" in unchanged


def test_products_are_written_and_repeatable(config, model, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = text_task(config, "\nabcdefghij")
    assert missing_products(config)
    texts = make_products(config, None, model, task, command="")
    assert not missing_products(config)
    assert len(set(texts)) == 2
    assert (tmp_path / "samples.txt").read_text() == (
        f"--- sample 1 ---\n{texts[0]}\n\n--- sample 2 ---\n{texts[1]}\n\n"
    )
    before = {name: (tmp_path / name).read_bytes() for name in files(config.task)}
    assert make_products(config, None, model, task, command="") == texts
    assert {name: (tmp_path / name).read_bytes() for name in files(config.task)} == before


def test_samples_without_a_newline_in_the_vocabulary_and_none_at_all(config, model):
    task, key = text_task(config, "abcdefghijk"), jax.random.key(0)
    texts = task.sample_texts(model, 2, 5, key)
    assert [len(text) for text in texts] == [5, 5]
    assert task.sample_texts(model, 0, 5, key) == []


def test_tables():
    table = markdown_table(("a", "b"), [(1, "x|y")])
    assert table == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    sizes = (0, 1023, 1536, 3 * 2**20, 2**31)
    assert [human_bytes(n) for n in sizes] == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB", "2.0 GiB"]
