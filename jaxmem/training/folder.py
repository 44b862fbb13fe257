"""The folder of a run: whose it is, and the files that describe it."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jaxmem
from jaxmem.errors import CheckpointMismatch, ConfigError
from jaxmem.tasks.base import Task
from jaxmem.training.config import EXEMPT, RunConfig, diff, from_json, to_json
from jaxmem.training.disk import disk_errors, write_atomically

OURS = frozenset(
    {
        "config.json",
        "command.txt",
        "environment.json",
        "tokenizer.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "unreadable_checkpoints",
        "plots",
        "samples.txt",
        "evaluate.json",
        "run.md",
        "log.txt",
        "lock",
        "wandb",
    }
)
"""What a run folder may hold."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_folder(config: RunConfig) -> list[str]:
    """Check, without touching anything, that the run may use its folder.

    The config of a run that ended before it had a result does not bind the next one.

    Returns:
      Notes on differences to the folder's config that do not stop the run.

    Raises:
      ConfigError: the path is a file, or a folder with other things in it.
      CheckpointMismatch: the folder belongs to a run of another config.
    """
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`run.dir`: {folder} is a file. Choose another folder.")
    saved_path = folder / "config.json"
    if not saved_path.exists():
        names = sorted(os.listdir(folder)) if folder.exists() else []
        other = [name for name in names if name not in OURS and not name.endswith(".part")]
        if other:
            raise ConfigError(
                f"`run.dir`: {folder} is not a run folder; it holds {', '.join(other[:5])}"
                f"{' and more' if len(other) > 5 else ''}. Choose an empty or a new folder."
            )
        return []
    saved = saved_config(folder)
    return _compare(saved, config) if has_begun(folder) else []


def has_begun(folder: Path) -> bool:
    """Say whether a run folder holds a checkpoint or a row of metrics."""
    rows = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("[0-9]*")) or (
        rows.is_file() and rows.stat().st_size > 0
    )


def saved_config(folder: Path) -> RunConfig:
    """Read the config of a run folder.

    Raises:
      CheckpointMismatch: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), name=str(path))
    except FileNotFoundError as err:
        raise CheckpointMismatch(f"{folder} is not a run folder: it has no config.json.") from err
    except (ConfigError, UnicodeDecodeError) as err:
        raise CheckpointMismatch(
            f"{err} The run in this folder cannot be resumed; choose another `run.dir`."
        ) from err


def _compare(saved: RunConfig, config: RunConfig) -> list[str]:
    changes = diff(saved, config)
    matter = [change for change in changes if change[0] not in EXEMPT]
    lines = [f"{path}: {old!r} in the folder, {new!r} now" for path, old, new in matter]
    if matter and not config.run.allow_config_change:
        listing = "\n  ".join(lines)
        raise CheckpointMismatch(
            f"{config.run.folder} holds a run of another config:\n  {listing}\n"
            "Choose another `run.dir` or `run.name`, or resume with `--run.allow-config-change`."
        )
    notes = [f"config changed: {line}" for line in lines]
    paths = {path for path, _, _ in changes}
    if "parallel.mesh" in paths:
        notes.append(
            "the mesh changed: results equal the earlier ones within rounding, not exactly"
        )
    schedule = config.optim.schedule
    if "run.steps" in paths and not config.optim.decay_steps and schedule in ("cosine", "linear"):
        notes.append(
            f"`optim.decay_steps=0` follows `run.steps`: the {schedule} now ends at the new one"
        )
    return notes


def write_description(
    config: RunConfig, command: Sequence[str], environment: dict[str, Any]
) -> list[str]:
    """Write config.json, environment.json, and this start's line of command.txt.

    Returns:
      Notes on an environment that is not the one the run was begun in.
    """
    folder = config.run.folder
    notes = []
    path = folder / "environment.json"
    if path.exists() and has_begun(folder):
        before = _read_object(path)
        changed = [
            key for key in ("jax", "jaxlib", "devices") if before.get(key) != environment[key]
        ]
        notes = [
            f"{key} was {before.get(key)}, now {environment[key]}: exact equality with an "
            "uninterrupted run is not to be expected"
            for key in changed
        ]
    write_atomically(folder / "config.json", to_json(config))
    write_atomically(path, json.dumps(environment, indent=2) + "\n")
    with disk_errors(folder), (folder / "command.txt").open("a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
    return notes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # only used for a note: all keys then count as changed
        return {}


def keep_files(folder: Path, task: Task) -> None:
    """Write what the task keeps with a run, or check that of a run that has begun.

    Raises:
      CheckpointMismatch: the files of the run do not belong to the data opened now.
    """
    files = task.files()
    if has_begun(folder) and all((folder / name).exists() for name in files):
        task.check_files(folder)
        return
    for name, text in files.items():
        write_atomically(folder / name, text)


def check_data(config: RunConfig, task: Task, saved: str, found: str) -> list[str]:
    """Check that the data are those that the checkpoint was trained on.

    Args:
      config: the run.
      task: open; knows what it means that the data differ.
      saved: fingerprint in the newest checkpoint, empty if there is none.
      found: fingerprint of the data.

    Returns:
      A note if they are not, and that is allowed.

    Raises:
      CheckpointMismatch: they are not, and that is not allowed.
    """
    if saved in ("", found):
        return []
    if not config.run.allow_config_change:
        raise CheckpointMismatch(
            f"The data are not those that {config.run.folder} was trained on: {task.changed}. "
            "Restore it, choose another `run.dir`, or resume with `--run.allow-config-change`."
        )
    return ["the data changed: they are not those that the run was begun with"]


def environment() -> dict[str, Any]:
    """Collect what a result may depend on: versions, devices, git revision."""
    devices = jax.devices()
    return {
        "jaxmem": jaxmem.__version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def git_revision() -> str | None:
    """Return the revision of the checkout that jaxmem is imported from, None outside one."""
    here = Path(jaxmem.__file__).parent
    for args in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "--short", "HEAD"]):
        try:
            done = subprocess.run(
                ["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
