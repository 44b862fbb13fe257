"""`train`: assemble a run from its config, start or resume it, and tell how it ended."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jaxmem.cache import enable_compilation_cache
from jaxmem.ops.dispatch import recording_choices
from jaxmem.parallel.mesh import build_mesh
from jaxmem.tasks.base import Task
from jaxmem.training import folder as run_folder
from jaxmem.training.checkpoint import Checkpoints, Meta
from jaxmem.training.config import RunConfig, to_dict
from jaxmem.training.console import RunLog
from jaxmem.training.disk import disk_errors
from jaxmem.training.feed import Feed
from jaxmem.training.guard import NonFiniteGuard
from jaxmem.training.head import compiled_lines, head
from jaxmem.training.lock import run_lock
from jaxmem.training.loop import Loop, LoopEnd, Parts
from jaxmem.training.metrics import JsonlFile, NoFile, TensorBoard, WandB, Writer
from jaxmem.training.optim import adamw, decays, learning_rate
from jaxmem.training.rundata import RunData, open_data
from jaxmem.training.state import StateInit, TrainState
from jaxmem.training.state_format import StateFormat
from jaxmem.training.step import Steps
from jaxmem.training.stopping import StopRequest


class TrainResult(NamedTuple):
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    """Updates done."""
    val_loss: float | None
    """Validation loss at that step; None if the run stopped elsewhere."""
    stopped: Literal["finished", "preempted", "already finished"]


AtEnd = Callable[[TrainResult, Any, Task], None]
"""Called after the last update with the result, the trained model and the task."""


def train(
    config: RunConfig,
    *,
    preset: RunConfig | None = None,
    command: Sequence[str] = (),
    at_end: AtEnd | None = None,
) -> TrainResult:
    """Train, or go on training, the run that a config describes.

    Everything is written into the run's folder. If that holds a run of the same config, it goes on
    from its newest readable checkpoint, bit for bit as if it had never stopped.

    Args:
      config: the run.
      preset: what the config was made from; the log shows the difference.
      command: the command line, kept in command.txt.
      at_end: makes the products of a finished run (plots, samples); not called on preemption.

    Returns:
      Where the run is, how far it got and why it stopped.

    Raises:
      ConfigError: the config does not fit the machine, the data or the folder.
      CheckpointMismatch: the folder belongs to another config or text, or cannot be read.
      DataError: the data are missing or too small.
      NonFiniteLoss: an update was not finite.
      JaxmemError: another process trains in the folder, or the disk is full or cannot be written.
    """
    enable_compilation_cache()
    mesh = build_mesh(config.parallel)
    folder = config.run.folder
    run_folder.check_folder(config)
    # A run that has not begun gets its folder only when its data are there and large enough.
    data = None if run_folder.has_begun(folder) else open_data(config, mesh)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        run_lock(folder),
        RunLog(folder / "log.txt") as log,
        _checkpoints(config, log) as checkpoints,
    ):
        newest = checkpoints.newest_meta()
        if newest and newest.reported and newest.step >= config.run.steps:
            log.line(
                f"{folder}: already finished at step {newest.step}; --run.steps M goes on to M."
            )
            return TrainResult(folder, newest.step, newest.val_loss, "already finished")
        data = data or open_data(config, mesh)
        corpus = data.task.fingerprint
        notes = _claim(config, data, corpus, newest, command)
        for line in (*head(config, preset, mesh, data.model.parts), *data.task.lines()):
            log.line(line)
        return _train(config, mesh, log, checkpoints, data, corpus, at_end, notes)


def _claim(
    config: RunConfig, data: RunData, corpus: str, newest: Meta | None, command: Sequence[str]
) -> list[str]:
    """Check once more, now under the lock, that the run may use its folder; describe it there."""
    folder = config.run.folder
    notes = run_folder.check_folder(config)
    run_folder.keep_files(folder, data.task)
    notes += run_folder.check_data(config, data.task, newest.corpus if newest else "", corpus)
    return notes + run_folder.write_description(config, command, run_folder.environment())


def _train(
    config: RunConfig,
    mesh: Mesh,
    log: RunLog,
    checkpoints: Checkpoints,
    data: RunData,
    corpus: str,
    at_end: AtEnd | None,
    notes: list[str],
) -> TrainResult:
    with ExitStack() as stack:
        loop = _assemble(config, mesh, data, corpus, checkpoints, log, stack)
        log.line(f"files      {config.run.folder}")
        for note in notes:
            log.line(f"note       {note}")
        stop = stack.enter_context(StopRequest())
        log.start(loop.step, config.run.steps)
        end = loop.run(stop)
        checkpoints.finish()
    log.stop()
    return _finish(config, end, data, log, at_end)


@contextmanager
def _checkpoints(config: RunConfig, log: RunLog) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(config.run.folder / "checkpoints", keep=config.run.keep, say=log.line)
    try:
        yield checkpoints
    finally:
        checkpoints.release()


def _assemble(
    config: RunConfig,
    mesh: Mesh,
    data: RunData,
    corpus: str,
    checkpoints: Checkpoints,
    log: RunLog,
    stack: ExitStack,
) -> Loop:
    """Compile the step, restore the newest checkpoint or begin, and open the metrics."""
    model, feed = data.model, data.feed
    steps = Steps(model.parts, data.task.loss, mesh, accumulate=config.optim.accumulate)
    schedule = learning_rate(config.optim, config.run.steps)
    optimizer = adamw(config.optim, schedule, model.parts.layout.map_shapes(decays))
    batch = feed.peek()
    init = StateInit(model.make, model.parts, optimizer, steps.aux_names(batch), mesh)
    step = jax.jit(
        steps.update(optimizer, config.optim.clip_norm),
        donate_argnums=0,
        out_shardings=(init.shardings, None),
    )
    with recording_choices() as choices:
        lowered = step.lower(init.abstract, batch)
    update = lowered.compile()
    for line in compiled_lines(update, choices):
        log.line(line)
    form = StateFormat(init.abstract, model.parts.layout, mesh)
    state, meta = _restore(config, checkpoints, form, feed, log) or (init(config.run.seed), None)
    jsonl, writers = _writers(config, meta, log, stack)
    parts = Parts(
        config=config,
        mesh=mesh,
        update=update,
        evaluate=steps.evaluate(),
        schedule=schedule,
        feed=feed,
        eval_sets=data.eval_sets,
        guard=NonFiniteGuard(steps),
        form=form,
        corpus=corpus,
        unit=data.task.unit,
        checkpoints=checkpoints,
        jsonl=jsonl,
        writers=writers,
        log=log,
    )
    return Loop(parts, state, meta)


def _restore(
    config: RunConfig, checkpoints: Checkpoints, form: StateFormat, feed: Feed, log: RunLog
) -> tuple[TrainState, Meta] | None:
    restored = checkpoints.restore_newest(form)
    if restored is None:
        return None
    checkpoints.set_aside_after(restored.meta.step)
    feed.restore(restored.position, restored.meta.step)
    log.line(f"resume     from step {restored.meta.step} of {config.run.steps}")
    return restored.state, restored.meta


def _writers(
    config: RunConfig, meta: Meta | None, log: RunLog, stack: ExitStack
) -> tuple[JsonlFile | NoFile, list[Writer]]:
    if jax.process_index():
        return NoFile(), []
    folder = config.run.folder
    begin = 0 if meta is None else meta.step + meta.reported
    old = (folder / "tensorboard").exists()
    jsonl = JsonlFile(folder / "metrics.jsonl", meta.metrics_bytes if meta else 0, log.line)
    writers: list[Writer] = [
        TensorBoard(folder / "tensorboard", resume_step=begin if old else None)
    ]
    if config.run.wandb:
        writers.append(WandB(folder, config.run.name or folder.name, to_dict(config)))
    for writer in (jsonl, *writers):
        stack.callback(writer.close)
    return jsonl, writers


def _finish(
    config: RunConfig,
    end: LoopEnd,
    data: RunData,
    log: RunLog,
    at_end: AtEnd | None,
) -> TrainResult:
    folder = config.run.folder
    result = TrainResult(folder, end.step, end.val_loss, end.stopped)
    if end.stopped == "preempted":
        log.line(f"Stopped at step {end.step}; start the same command again to go on.")
        return result
    if at_end is not None:
        at_end(result, data.model.parts.merge(end.state.params), data.task)
    log.line(f"Finished at step {end.step}, val {end.val_loss:.4f}. Everything is in {folder}.")
    return result
