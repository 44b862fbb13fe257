"""A run that was stopped anywhere and started again equals the one that never stopped."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import threading

import numpy as np
import pytest

from jaxmem.errors import CheckpointMismatch, JaxmemError
from jaxmem.training.loop import Loop
from jaxmem.training.model import load_run
from jaxmem.training.run import train
from tests.helpers.tiny_run import LIGHT_MODEL, rows, saved_arrays, tiny_run, with_run


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The run of this file; each test trains it in a folder of its own, on the same text."""
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", model=LIGHT_MODEL)


@pytest.fixture(scope="module")
def whole(config):
    """The uninterrupted run: rows of metrics and all saved arrays of its last checkpoint."""
    train(config)
    return rows(config.run.folder), saved_arrays(config.run.folder, 12)


@pytest.fixture
def tiny(config, tmp_path):
    return with_run(config, dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """The folder of a run that was killed before update 10, with checkpoints 4 and 8."""
    run = with_run(config, dir=str(tmp_path_factory.mktemp("killed") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 10, "kill")
        with pytest.raises(Killed):
            train(run)
    return run.run.folder


def stop_at(monkeypatch, step, how):
    """Before update `step`: send SIGTERM to this process, or die without cleaning up."""
    update = Loop._update

    def stopping(self):
        if self.step == step:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        update(self)

    monkeypatch.setattr(Loop, "_update", stopping)


def assert_equal_to(whole, config):
    want_rows, want_arrays = whole
    assert rows(config.run.folder) == want_rows
    arrays = saved_arrays(config.run.folder, 12)
    assert arrays.keys() == want_arrays.keys()
    for name, want in want_arrays.items():
        np.testing.assert_array_equal(arrays[name], want, err_msg=name)


@pytest.mark.parametrize("step", [1, 4, 7, 10])
def test_killed_run_equals_uninterrupted(whole, tiny, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step, "kill")
        with pytest.raises(Killed):
            train(tiny)
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


# SIGTERM arrives during the update with this number and is seen before the next one: in the middle
# of a log interval, where a row is due, where an evaluation is due, and after the last update.
@pytest.mark.parametrize("step", [0, 4, 5, 7, 11])
def test_sigterm_saves_at_once_and_resumes_exactly(whole, tiny, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step, "term")
        result = train(tiny)
    assert (result.stopped, result.step) == ("preempted", step + 1)
    assert (tiny.run.folder / "checkpoints" / str(step + 1)).is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_stopped_twice_without_progress_between(whole, tiny, monkeypatch):
    for step in (2, 6):
        with monkeypatch.context() as patch:
            stop_at(patch, step, "term")
            train(tiny)
    with monkeypatch.context() as patch:
        patch.setattr("jaxmem.training.stopping.StopRequest.agreed", lambda *_: True)
        assert train(tiny).step == 7
    train(tiny)
    assert_equal_to(whole, tiny)


@pytest.mark.parametrize(
    "file",
    ["params/d/*", "opt_state/d/*", "loop/manifest.ocdbt", "data/process_*", "meta/metadata"],
)
def test_damaged_checkpoint_falls_back_and_says_so(whole, killed, tiny, capsys, file):
    shutil.copytree(killed, tiny.run.folder)
    for path in (tiny.run.folder / "checkpoints" / "8").glob(file):
        os.truncate(path, path.stat().st_size // 2)
    capsys.readouterr()
    train(tiny)
    out = capsys.readouterr().out
    assert "checkpoint at step 8 cannot be read" in out
    assert "resume     from step 4 of 12" in out
    assert (tiny.run.folder / "unreadable_checkpoints" / "8").is_dir()
    assert_equal_to(whole, tiny)


@pytest.mark.parametrize("item", ["params", "opt_state", "loop", "data", "meta"])
def test_other_values_in_whole_files_are_noticed(whole, killed, tiny, capsys, item):
    shutil.copytree(killed, tiny.run.folder)
    put_older_values(tiny.run.folder, item)
    capsys.readouterr()
    train(tiny)
    out = capsys.readouterr().out
    assert f"checkpoint at step 8 cannot be read (ValueError: {item}" in out
    assert "changed since it was saved" in out
    assert "resume     from step 4 of 12" in out
    assert_equal_to(whole, tiny)


def put_older_values(folder, item):
    """Replace an item of checkpoint 8 by that of checkpoint 4: readable, of the right shapes."""
    new, old = (folder / "checkpoints" / step / item for step in ("8", "4"))
    shutil.rmtree(new)
    shutil.copytree(old, new)


def test_loading_a_damaged_run_falls_back_then_says_why_not(tiny, capfd):
    train(with_run(tiny, steps=8))
    folder = tiny.run.folder
    put_older_values(folder, "params")
    capfd.readouterr()
    assert load_run(folder, checkpoint="last").step == 4
    err = capfd.readouterr().err
    assert re.fullmatch(r"The checkpoint at step 8 .* cannot be read .*step 4\.\n", err)
    with pytest.raises(CheckpointMismatch, match=r"checkpoint at step 8 .* cannot be read"):
        load_run(folder, checkpoint=8)
    for path in (folder / "checkpoints" / "4" / "params" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointMismatch, match=r"None of the checkpoints can be read"):
        load_run(folder)


def test_finished_run_without_its_last_parameters_is_trained_again(whole, tiny):
    train(tiny)
    shutil.rmtree(tiny.run.folder / "checkpoints" / "12" / "params")
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_nothing_readable_stops_with_the_reasons(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 6, "kill")
        with pytest.raises(Killed):
            train(tiny)
    shutil.rmtree(tiny.run.folder / "checkpoints" / "4" / "params")
    with pytest.raises(CheckpointMismatch, match=r"None of the checkpoints .* \(step 4"):
        train(tiny)
    assert (tiny.run.folder / "checkpoints" / "4").is_dir()


def test_full_disk_while_saving_keeps_the_older_checkpoint(whole, tiny, monkeypatch):
    from orbax.checkpoint import JsonCheckpointHandler

    save = JsonCheckpointHandler.async_save

    async def full(self, directory, *args, **kwargs):
        if "8" in str(directory.parent.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return await save(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(JsonCheckpointHandler, "async_save", full)
        with pytest.raises(JaxmemError, match=r"disk is full: .*checkpoints.*intact"):
            train(tiny)
    # In one process the other items' writers may still be busy; a new process has none.
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(5)
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_more_steps_go_on(whole, tiny):
    train(with_run(tiny, steps=8))
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_config_change_must_be_allowed_and_shapes_must_fit(tiny, capsys):
    train(with_run(tiny, steps=4))
    slower = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, lr=5e-3))
    with pytest.raises(CheckpointMismatch, match=r"optim\.lr: 0\.01 in the folder, 0\.005 now"):
        train(slower)
    capsys.readouterr()
    assert train(with_run(slower, steps=8, allow_config_change=True)).step == 8
    assert "config changed: optim.lr" in capsys.readouterr().out
    deeper = dataclasses.replace(slower, model=dataclasses.replace(tiny.model, depth=2))
    with pytest.raises(CheckpointMismatch, match=r"blocks\.1\..*saved no such"):
        train(with_run(deeper, steps=12, allow_config_change=True))


def test_newest_and_best_are_kept(tiny, monkeypatch):
    losses = {0: 9.0, 2: 1.0, 4: 5.0, 6: 4.0, 8: 3.0}
    monkeypatch.setattr(Loop, "_evaluate", lambda self, name: {"loss": losses[self.step]})
    train(with_run(tiny, steps=8, eval_every=2, keep=2))
    kept = sorted(int(p.name) for p in (tiny.run.folder / "checkpoints").iterdir())
    assert kept == [2, 6, 8]
