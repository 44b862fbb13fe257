"""metrics.jsonl, its position, TensorBoard files, Weights & Biases, and a full disk."""

import errno
import json
import sys
from types import SimpleNamespace

import pytest

from jaxmem.errors import JaxmemError, MissingExtra
from jaxmem.training import metrics
from jaxmem.training.console import duration, progress_text
from jaxmem.training.metrics import JsonlFile, TensorBoard, WandB


def test_rows_are_cut_to_the_position_and_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonlFile(path, 0, print)
    file.write({"step": 1})
    position = file.position
    file.write({"step": 2})
    file.close()
    again = JsonlFile(path, position, pytest.fail)
    assert again.position == position
    again.write({"step": 3})
    again.sync()
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_shortened_file_is_reported_and_stays_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    said = []
    file = JsonlFile(path, 500, said.append)
    file.write({"step": 9})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'
    assert "metrics.jsonl has 19 bytes, the checkpoint counted 500" in said[0]


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    file = JsonlFile(tmp_path / "metrics.jsonl", 0, print)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file, "_file", SimpleNamespace(write=full))
        with pytest.raises(JaxmemError, match=r"disk is full: .*metrics\.jsonl.*free some space"):
            file.write({"step": 1})
    file.close()


def test_tensorboard_events_carry_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    board = TensorBoard(tmp_path / "tb", resume_step=None)
    board.write({"step": 4, "train_loss": 2.5, "val_loss": 3.0, "tokens_per_s": 10.0})
    board.close()
    (path,) = (tmp_path / "tb").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        scalars |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert scalars == {
        "train/train_loss": (4, 2.5),
        "eval/val_loss": (4, 3.0),
        "speed/tokens_per_s": (4, 10.0),
    }


def test_wandb_is_an_extra_and_resumes_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"jaxmem\[wandb\]"):
        WandB(tmp_path, "a", {})
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda **kw: calls.append((kw["id"], kw["resume"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandB(tmp_path, "a/b", {})
    writer.write({"step": 2, "train_loss": 1.0})
    writer.close()
    assert calls == [("a-b", "allow"), (2, {"train/train_loss": 1.0}), "end"]


def test_progress_text():
    row = {"train_loss": 1.23456, "val_loss": 2.0, "tokens_per_s": 12345.6}
    assert progress_text(row, 65) == "loss 1.2346  val 2.0000  12,346 tokens/s  1 min 05 s left"
    assert [duration(s) for s in (3.4, 3605, 7500)] == ["3 s", "1 h 00 min", "2 h 05 min"]
    assert {"seconds", "step_ms"} <= metrics.MACHINE_FIELDS
