"""The loop: update, evaluate, report, save; and the order in which these happen.

With k updates done: evaluate if k is due, write the row of metrics, save a checkpoint, then make
update k. After the last update there is one more evaluation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmem.errors import NonFiniteLoss
from jaxmem.parallel.mesh import replicated
from jaxmem.training.checkpoint import Checkpoints, Meta
from jaxmem.training.config import RunConfig
from jaxmem.training.console import RunLog, progress_text
from jaxmem.training.feed import Batch, EvalSet, Feed
from jaxmem.training.guard import NonFiniteGuard
from jaxmem.training.layout import Params
from jaxmem.training.metrics import JsonlFile, NoFile, Row, Writer, peak_bytes
from jaxmem.training.state import TrainState, empty_interval
from jaxmem.training.state_format import StateFormat
from jaxmem.training.step import Report, Sums
from jaxmem.training.stopping import StopRequest

Update = Callable[[TrainState, Batch], tuple[TrainState, Report]]
Evaluate = Callable[[Params, Batch], Sums]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the loop drives."""

    config: RunConfig
    mesh: Mesh
    update: Update
    evaluate: Evaluate
    schedule: optax.Schedule
    feed: Feed
    eval_sets: dict[str, EvalSet]
    """Evaluation batches by what their fields in the metrics begin with."""
    guard: NonFiniteGuard
    form: StateFormat
    corpus: str
    """Fingerprint of the data."""
    unit: str
    """What the task counts, for the console."""
    checkpoints: Checkpoints
    jsonl: JsonlFile | NoFile
    writers: Sequence[Writer]
    log: RunLog


class LoopEnd(NamedTuple):
    """How the loop ended."""

    state: TrainState
    step: int
    val_loss: float | None
    stopped: Literal["finished", "preempted"]


class Loop:
    """One start of a run: from a state (fresh or restored) to the last update or a signal."""

    def __init__(self, parts: Parts, state: TrainState, meta: Meta | None):
        """Take the state; `meta` is that of the checkpoint it was restored from."""
        self.parts = parts
        self.state = state
        self.step = meta.step if meta else 0
        self.tokens = meta.tokens if meta else 0
        self._reported = meta.reported if meta else False
        self._saved = meta
        self._val_loss = meta.val_loss if meta else None
        self._seconds = meta.seconds if meta else 0.0
        self._started = self._resumed = time.perf_counter()
        self._updates = 0
        self._zeros = empty_interval(list(state.interval.aux))

    def run(self, stop: StopRequest) -> LoopEnd:
        """Train until `run.steps`, or until asked to stop."""
        run = self.parts.config.run
        while True:
            due = self._due() and not self._reported
            if stop.agreed(self.step, run.log_every):
                self.parts.log.line(f"{stop.name}: saving at step {self.step} and stopping.")
                self._settle()
                self._save(reported=not due)
                return self._end("preempted")
            if due:
                self._report()
            self._reported = False
            if self.step >= run.steps:
                return self._end("finished")
            self._update()

    def _update(self) -> None:
        parts = self.parts
        batch = parts.feed.take()
        self.state, report = parts.update(self.state, batch)
        parts.guard.add(report, batch)
        self.step += 1
        self._updates += 1
        if self.step < parts.config.run.steps:
            parts.feed.prefetch()
        parts.guard.check(self.state, wait=False)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.parts.config.run.steps

    def _due(self) -> bool:
        run = self.parts.config.run
        return any(map(self._is_due, (run.log_every, run.eval_every, run.checkpoint_interval)))

    def _settle(self) -> None:
        """Wait for the device; from here on the state is known to be finite."""
        jax.block_until_ready(self.state.step)
        self.parts.guard.check(self.state, wait=True)

    def _report(self) -> None:
        """Evaluate, write the row of metrics, save: whatever is due at this step."""
        run = self.parts.config.run
        self._settle()
        busy = time.perf_counter() - self._resumed
        evaluated = self._is_due(run.eval_every)
        self._val_loss = None
        if evaluated or self.step % run.log_every == 0:
            row = self._row(busy, evaluated=evaluated)
            for writer in (self.parts.jsonl, *self.parts.writers):
                writer.write(row)
            left = row["step_ms"] * (run.steps - self.step) / 1e3 if "step_ms" in row else None
            left = left if self.step < run.steps else None
            text = progress_text(row, left, self.parts.unit)
            self.parts.log.progress(self.step, run.steps, text, keep=evaluated)
        self.parts.checkpoints.check()
        if self.step and self._is_due(run.checkpoint_interval):
            self._save(reported=True)
        self._resumed = time.perf_counter()
        self._updates = 0

    def _row(self, busy: float, *, evaluated: bool) -> Row:
        """Build the row of metrics at this step and begin the next interval."""
        interval = jax.device_get(self.state.interval)
        count = int(interval.tokens)
        self.tokens += count
        row: Row = {"step": self.step, "tokens": self.tokens}
        if count:
            row["train_loss"] = float(interval.loss / count)
            row["lr"] = float(np.asarray(self.parts.schedule(self.step - 1)))
            row["grad_norm"] = float(interval.grad_norm)
            row |= {f"aux/{name}": float(x / count) for name, x in interval.aux.items()}
        if evaluated:
            for name in self.parts.eval_sets:
                row |= {f"{name}_{what}": mean for what, mean in self._evaluate(name).items()}
            self._val_loss = row["val_loss"]
        row["seconds"] = round(self._elapsed(), 3)
        if self._updates:
            row["step_ms"] = round(1e3 * busy / self._updates, 3)
            row["tokens_per_s"] = round(count / busy, 1)
        row["peak_bytes"] = peak_bytes()
        self.state = self.state._replace(
            interval=jax.device_put(self._zeros, replicated(self.parts.mesh))
        )
        return row

    def _evaluate(self, name: str) -> dict[str, float]:
        """Return the means of the loss and of the metrics over one evaluation set."""
        batches = self.parts.eval_sets[name]
        sums = jax.device_get([self.parts.evaluate(self.state.params, b) for b in batches])
        count = max(int(np.sum([part.tokens for part in sums])), 1)
        parts = [{"loss": part.loss} | part.aux for part in sums]
        means = {
            what: float(np.sum([part[what] for part in parts], dtype=np.float64) / count)
            for what in parts[0]
        }
        if not np.isfinite(means["loss"]):
            raise NonFiniteLoss(
                f"{name}_loss is {means['loss']} at step {self.step}, although all updates so far "
                "were finite. Nothing after the last good checkpoint was saved. Lower `optim.lr`."
            )
        return means

    def _save(self, *, reported: bool) -> None:
        saved = self._saved
        if saved and saved.step == self.step and saved.reported >= reported:
            return
        parts = self.parts
        parts.jsonl.sync()
        meta = Meta(
            step=self.step,
            metrics_bytes=parts.jsonl.position,
            tokens=self.tokens,
            seconds=self._elapsed(),
            reported=reported,
            val_loss=self._val_loss if reported else None,
            processes=jax.process_count(),
            mesh=parts.config.parallel.mesh,
            corpus=parts.corpus,
        )
        parts.checkpoints.save(parts.form.pack(self.state), parts.feed.position, meta)
        self._saved = meta

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started

    def _end(self, stopped: Literal["finished", "preempted"]) -> LoopEnd:
        return LoopEnd(self.state, self.step, self._val_loss, stopped)
