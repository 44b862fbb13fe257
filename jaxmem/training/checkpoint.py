"""Checkpoints: arrays, random key, data position and metrics position in one composite.

On disk every parameter has its own name, whatever the layout in memory. Orbax writes into a
temporary folder and renames it when all is there, so a kill leaves a whole checkpoint or none.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointHandler, CheckpointRestore, CheckpointSave
from orbax.checkpoint import checkpoint_managers as policies

from jaxmem.errors import CheckpointMismatch
from jaxmem.training.checksum import Items, checksums, damaged, json_checksum
from jaxmem.training.disk import disk_errors
from jaxmem.training.layout import Params
from jaxmem.training.quiet import ignore_closed_loops, quiet_loggers
from jaxmem.training.state import TrainState
from jaxmem.training.state_format import StateFormat

FORMAT = 1
"""Version of the layout on disk; raised when a reader of the old one could misread the new one."""


class UnreadableCheckpoint(CheckpointMismatch):
    """A checkpoint is damaged; an older one may not be."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says about itself besides arrays."""

    step: int
    """Updates done."""
    metrics_bytes: int
    """Bytes of metrics.jsonl that belong to this checkpoint."""
    tokens: int
    """Scored tokens up to the last row of metrics."""
    seconds: float
    """Time spent training, over all parts of the run."""
    reported: bool
    """Whether the evaluation and row of metrics at this step, if due, were made."""
    val_loss: float | None
    """Validation loss at this step, if it was evaluated."""
    processes: int
    """Number of processes that shared the data."""
    mesh: str
    """The mesh it was saved from."""
    corpus: str
    """Fingerprint of the data."""
    checksums: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Checksum of every array by item and name, filled in when it is saved."""
    format: int = FORMAT


class DataPosition:
    """The data iterator's position as grain's checkpoint handler wants it: bytes of JSON."""

    def __init__(self, state: Any = None):
        self.state = state

    def get_state(self) -> bytes:
        """Return the position."""
        return json.dumps(self.state).encode()

    def set_state(self, state: bytes) -> None:
        """Take the position from a checkpoint."""
        self.state = json.loads(state)

    def start_prefetch(self) -> None:
        """Do nothing; the handler calls this on the iterators it restores."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    state: TrainState
    position: Any
    """Position of the data iterator; None if it was saved by another number of processes."""
    meta: Meta


class Checkpoints:
    """The `checkpoints` folder of a run: the newest `keep`, and the best by validation loss."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        say: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        """Open the folder; what a kill left half written is removed.

        Args:
          folder: where checkpoints are; created if it does not exist.
          keep: how many of the newest are kept.
          say: called with messages for the user.
          read_only: only for reading: nothing is created, removed or moved.
        """
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_loggers())
        self._hear_again = ignore_closed_loops()
        self._failed = False
        self._folder = folder.absolute()
        self._say = say
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_newest_and_best(keep),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
        )
        with self._disk_errors():
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=options,
                item_handlers={  # pyright: ignore[reportArgumentType]: grain's lacks a declared base
                    "params": ocp.StandardCheckpointHandler(),
                    "opt_state": ocp.StandardCheckpointHandler(),
                    "loop": ocp.StandardCheckpointHandler(),
                    "data": CheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            with disk_errors(self._folder):
                yield
        except Exception:
            self._failed = True
            raise

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        items: Items,
        position: Any,
        meta: Meta,
    ) -> None:
        """Start to write a checkpoint; the arrays are copied before this returns.

        Raises:
          JaxmemError: the disk is full (also when that happened to the checkpoint before).
        """
        sums = checksums(items)
        if meta.processes == 1:  # several processes each save a position of their own
            sums["data"] = {"position": json_checksum(position)}
        tree = asdict(replace(meta, checksums=sums))
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(dict(leaves)) for name, leaves in items.items()},
            data=CheckpointSave(DataPosition(position)),
            meta=ocp.args.JsonSave(tree | {"crc32": json_checksum(tree)}),
        )
        metrics = None if meta.val_loss is None else {"val_loss": meta.val_loss}
        with self._disk_errors():
            self._manager.wait_until_finished()
            if meta.step in self._manager.all_steps():
                # Saved on preemption before its evaluation; the run will get here again if killed.
                self._manager.delete(meta.step)
            self._manager.save(meta.step, args=args, metrics=metrics, force=True)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        with self._disk_errors():
            self._manager.check_for_errors()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
          JaxmemError: the disk is full.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()

    def release(self) -> None:
        """Close the manager; what could not be written was reported by `finish` or `check`."""
        with self._quiet, suppress(Exception):
            self._manager.close()
        # After an error, arrays that were under way may still arrive, up to the end of Python.
        if not self._failed:
            self._hear_again()

    def meta(self, step: int) -> Meta:
        """Read what a checkpoint says about itself.

        Raises:
          CheckpointMismatch: it was written by a newer version of jaxmem.
          ValueError: it is damaged; other errors, if it cannot be read at all.
        """
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        tree = self._manager.restore(step, args=args)["meta"]
        if tree["format"] > FORMAT:
            raise CheckpointMismatch(
                f"The checkpoint at step {step} has format {tree['format']}, this version of "
                f"jaxmem reads up to {FORMAT}. Use the version that wrote it, or a newer one."
            )
        crc32 = tree.pop("crc32")
        if tree["step"] != step or crc32 != json_checksum(tree):
            raise ValueError("meta changed since it was saved")
        return Meta(**tree)

    def newest_meta(self) -> Meta | None:
        """Return the meta of the newest checkpoint that looks whole, None if there is none.

        Raises:
          CheckpointMismatch: it was written by a newer version of jaxmem.
        """
        for step in reversed(self.steps()):
            try:
                found = self._manager.item_metadata(step)
                if all(found[item] is not None for item in ("params", "opt_state", "loop")):
                    return self.meta(step)
            except CheckpointMismatch:
                raise
            except Exception:  # unreadable: restore_newest will say so and fall back
                continue
        return None

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss, the later of equals."""
        losses = {step: self._metrics(step) for step in self.steps()}
        known = {step: m["val_loss"] for step, m in losses.items() if m and "val_loss" in m}
        return min(known, key=lambda step: (known[step], -step), default=None)

    def _metrics(self, step: int) -> Mapping[str, float] | None:
        try:
            return self._manager.metrics(step)
        except Exception:  # damaged: the others remain to choose from
            return None

    def restore_newest(self, form: StateFormat) -> Restored | None:
        """Restore the newest readable checkpoint onto the current mesh.

        One that cannot be read is moved to `unreadable_checkpoints`, with a message.

        Returns:
          The checkpoint, or None if there are none at all.

        Raises:
          CheckpointMismatch: its parameters are not those of this model, or none can be read.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return self._restore(step, form)
            except CheckpointMismatch:
                raise
            except Exception as err:  # whatever reading a damaged file raises
                self._failed = True
                problems.append(f"step {step}: {_first_line(err)}")
                self._say(f"The checkpoint at step {step} cannot be read ({_first_line(err)}).")
        if problems:
            raise CheckpointMismatch(
                f"None of the checkpoints in {self._folder} can be read ({'; '.join(problems)}). "
                "Move the run folder away to start anew, or restore the files."
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints newer than a step, found unreadable, out of the way of new ones."""
        aside = self._folder.parent / "unreadable_checkpoints"
        for bad in [s for s in self.steps() if s > step]:
            if jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                target = aside / str(bad)
                while target.exists():
                    target = target.with_name(f"{target.name}_")
                (self._folder / str(bad)).rename(target)
            self._say(f"Moved the unreadable checkpoint of step {bad} to {aside.name}.")
        self._manager.reload()

    def restore_params(self, step: int, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
        """Read the parameters of one checkpoint by their single names.

        Raises:
          CheckpointMismatch: they are not those of this model, or cannot be read.
        """
        try:
            meta = self.meta(step)
            self._check_params(step, targets)
            args = ocp.args.Composite(params=ocp.args.StandardRestore(dict(targets)))
            params = self._manager.restore(step, args=args)["params"]
            _verify({"params": params}, meta)
        except CheckpointMismatch:
            raise
        except Exception as err:  # whatever reading a damaged file raises
            self._failed = True
            raise UnreadableCheckpoint(
                f"The checkpoint at step {step} of {self._folder} cannot be read "
                f"({_first_line(err)}). Use another one, or restore the files."
            ) from err
        return params

    def _restore(self, step: int, form: StateFormat) -> Restored:
        meta = self.meta(step)
        targets = form.targets()
        self._check_params(step, targets["params"])
        restore: dict[str, ocp.args.CheckpointArgs] = {
            name: ocp.args.StandardRestore(leaves) for name, leaves in targets.items()
        }
        position = DataPosition()
        if meta.processes == jax.process_count():
            restore["data"] = CheckpointRestore(position)
        got = self._manager.restore(step, args=ocp.args.Composite(**restore))
        items = {name: got[name] for name in targets}
        _verify(items, meta)
        saved = meta.checksums.get("data", {}).get("position")
        if position.state is not None and saved not in (None, json_checksum(position.state)):
            raise ValueError("data/position changed since it was saved")
        return Restored(form.unpack(items), position.state, meta)

    def _check_params(self, step: int, targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        saved = self._manager.item_metadata(step)["params"]
        if saved is None:
            raise ValueError("the parameters' metadata is missing")
        found = {name: tuple(leaf.shape) for name, leaf in dict(saved.tree).items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in targets.items()}
        if found == wanted:
            return
        differ = [
            f"{name}: saved {found.get(name, 'no such')}, wanted {wanted.get(name, 'no such')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise CheckpointMismatch(
            f"The checkpoint at step {step} does not fit this model: "
            f"{'; '.join(differ[:5])}{more}. "
            "Use the run's own config, or another `run.dir` to start anew."
        )


def _verify(items: Items, meta: Meta) -> None:
    """Raise ValueError if arrays are not those that were saved."""
    bad = damaged(items, meta.checksums)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more} changed since it was saved")


def _newest_and_best(keep: int) -> policies.PreservationPolicy:
    best = policies.BestN(
        get_metric_fn=lambda metrics: -metrics["val_loss"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return policies.AnyPreservationPolicy([policies.LatestN(keep), best])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
