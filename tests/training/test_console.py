"""The progress line on a terminal, as wide as it is."""

import io
import re

import pytest

from jaxmem.training.console import RunLog, progress_text

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ROW = {"train_loss": 2.5, "eval_train_loss": 2.25, "val_loss": 2.375, "tokens_per_s": 123456.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [30, 80, 120])
def test_the_counter_is_whole_and_the_bar_gives_way_first(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    text = progress_text(ROW, 185)
    with RunLog(tmp_path / "log.txt", stream=screen) as log:
        log.start(0, 10_000)
        log.progress(250, 10_000, text, keep=False)
    lines = CODES.sub("", screen.getvalue()).replace("\r", "\n").splitlines()
    shown = [line for line in lines if "loss" in line]
    assert shown
    for line in shown:
        assert len(line) <= columns
        bar = re.fullmatch("step   250/10000 (.*) (loss.*)", line)
        assert bar
        assert text.startswith(bar[2].strip())
        # What is cut is cut because there is no bar left to shorten.
        assert text == bar[2].strip() or len(bar[1]) <= 2
    assert (tmp_path / "log.txt").read_text() == f"step 250/10000  {text}\n"
