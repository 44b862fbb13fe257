"""A run that was stopped anywhere and started again equals the one that never stopped."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

from jaxmem.errors import CheckpointMismatch, JaxmemError
from jaxmem.training.checkpoint import Checkpoints
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
    """The folder of a run that was killed before updates 1, 4, 7 and 10: checkpoints 4 and 8."""
    run = with_run(config, dir=str(tmp_path_factory.mktemp("killed") / "run"))
    for step in (1, 4, 7, 10):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step, "kill")
            with pytest.raises(Killed):
                train(run)
    return run.run.folder


@pytest.fixture
def again(killed, tiny):
    """The run in a copy of that folder."""
    shutil.copytree(killed, tiny.run.folder)
    return tiny


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


def test_killed_run_equals_uninterrupted(whole, again):
    assert train(again).stopped == "finished"
    assert_equal_to(whole, again)
    log = (again.run.folder / "log.txt").read_text()
    # Nothing was saved when it was killed for the first time, and 8 before the last time only.
    assert re.findall(r"resume     from step (\d+)", log) == ["4", "4", "8"]


def test_sigterm_saves_at_once_and_resumes_exactly(whole, tiny, monkeypatch):
    """SIGTERM arrives during the update with this number and is seen before the next one.

    In the middle of a log interval, where a row is due, where an evaluation is due, and after the
    last update. One start in between is stopped before its first update.
    """
    for step in (0, 4, 5, 7, 11):
        with monkeypatch.context() as patch:
            stop_at(patch, step, "term")
            result = train(tiny)
        assert (result.stopped, result.step) == ("preempted", step + 1)
        assert (tiny.run.folder / "checkpoints" / str(step + 1)).is_dir()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if step == 4:
            with monkeypatch.context() as patch:
                patch.setattr("jaxmem.training.stopping.StopRequest.agreed", lambda *_: True)
                assert train(tiny).step == 5
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def truncate(folder, item):
    """Cut the files of an item of checkpoint 8 in half."""
    files = {"params": "d/*", "opt_state": "d/*", "loop": "manifest.ocdbt"}
    files |= {"data": "process_*", "meta": "metadata"}
    for path in (folder / "checkpoints" / "8" / item).glob(files[item]):
        os.truncate(path, path.stat().st_size // 2)


def put_older_values(folder, item):
    """Replace an item of checkpoint 8 by that of checkpoint 4: readable, of the right shapes."""
    new, old = (folder / "checkpoints" / step / item for step in ("8", "4"))
    shutil.rmtree(new)
    shutil.copytree(old, new)


@pytest.mark.parametrize(("damage", "item"), [(truncate, "params"), (put_older_values, "data")])
def test_damaged_checkpoint_falls_back_and_says_so(whole, again, capsys, damage, item):
    damage(again.run.folder, item)
    capsys.readouterr()
    train(again)
    out = capsys.readouterr().out
    assert "checkpoint at step 8 cannot be read" in out
    assert "resume     from step 4 of 12" in out
    assert (again.run.folder / "unreadable_checkpoints" / "8").is_dir()
    assert_equal_to(whole, again)


@pytest.fixture(scope="module")
def form(config, tmp_path_factory):
    """What reads the checkpoints of this file's runs."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", lambda loop, _: made.append(loop.parts.form) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(with_run(config, dir=str(tmp_path_factory.mktemp("form") / "run")))
    return made[0]


@pytest.fixture(scope="module")
def older(killed, form, tmp_path_factory):
    """Checkpoint 4 as it is read where there is no other."""
    folder = tmp_path_factory.mktemp("older") / "run"
    shutil.copytree(killed, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    return restored(folder, form, say=pytest.fail)


def restored(folder, form, *, say):
    """Read the newest checkpoint that is readable."""
    checkpoints = Checkpoints(folder / "checkpoints", say=say)
    try:
        return checkpoints.restore_newest(form)
    finally:
        checkpoints.release()


@pytest.mark.parametrize("damage", [truncate, put_older_values])
@pytest.mark.parametrize("item", ["params", "opt_state", "loop", "data", "meta"])
def test_damage_to_any_item_is_noticed(killed, form, older, tmp_path, damage, item):
    """The older checkpoint is then read; the test before shows that a run goes on from it."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damage(folder, item)
    said = []
    found = restored(folder, form, say=said.append)
    (line,) = said
    assert line.startswith("The checkpoint at step 8 cannot be read (")
    if damage is put_older_values:
        assert line.startswith(f"The checkpoint at step 8 cannot be read (ValueError: {item}")
        assert "changed since it was saved" in line
    assert older.meta.step == 4
    assert (found.meta, found.position) == (older.meta, older.position)
    for got, want in zip(*map(jax.tree.leaves, (found.state, older.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_loading_a_damaged_run_falls_back_then_says_why_not(again, capfd):
    folder = again.run.folder
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


def test_finished_run_without_its_last_parameters_is_trained_again(whole, config, tiny):
    shutil.copytree(config.run.folder, tiny.run.folder)
    shutil.rmtree(tiny.run.folder / "checkpoints" / "12" / "params")
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_nothing_readable_stops_with_the_reasons(again):
    folders = [again.run.folder / "checkpoints" / step for step in ("4", "8")]
    for folder in folders:
        shutil.rmtree(folder / "params")
    with pytest.raises(CheckpointMismatch, match=r"None of the checkpoints .* \(step 8.*; step 4"):
        train(again)
    assert all(folder.is_dir() for folder in folders)


def test_full_disk_while_saving_keeps_the_older_checkpoint(whole, again, monkeypatch):
    from orbax.checkpoint import JsonCheckpointHandler

    save = JsonCheckpointHandler.async_save

    async def full(self, directory, *args, **kwargs):
        if "12" in str(directory.parent.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return await save(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(JsonCheckpointHandler, "async_save", full)
        with pytest.raises(JaxmemError, match=r"disk is full: .*checkpoints.*intact"):
            train(again)
    # In one process the other items' writers may still be busy; a new process has none.
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(5)
    assert train(again).stopped == "finished"
    assert_equal_to(whole, again)


def test_more_steps_go_on(whole, tiny):
    train(with_run(tiny, steps=8))
    assert train(tiny).stopped == "finished"
    assert_equal_to(whole, tiny)


def test_config_change_must_be_allowed_and_shapes_must_fit(again, capsys):
    slower = dataclasses.replace(again, optim=dataclasses.replace(again.optim, lr=5e-3))
    with pytest.raises(CheckpointMismatch, match=r"optim\.lr: 0\.01 in the folder, 0\.005 now"):
        train(slower)
    capsys.readouterr()
    assert train(with_run(slower, allow_config_change=True)).step == 12
    assert "config changed: optim.lr" in capsys.readouterr().out
    deeper = dataclasses.replace(slower, model=dataclasses.replace(again.model, depth=2))
    with pytest.raises(CheckpointMismatch, match=r"layers\.1\..*saved no such"):
        train(with_run(deeper, steps=14, allow_config_change=True))


def test_newest_and_best_are_kept(tiny, monkeypatch):
    losses = {0: 9.0, 2: 1.0, 4: 5.0, 6: 4.0, 8: 3.0}
    monkeypatch.setattr(Loop, "_evaluate", lambda self, name: {"loss": losses[self.step]})
    train(with_run(tiny, steps=8, eval_every=2, keep=2))
    kept = sorted(int(p.name) for p in (tiny.run.folder / "checkpoints").iterdir())
    assert kept == [2, 6, 8]
