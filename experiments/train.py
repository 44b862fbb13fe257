"""Train a model: `python -m experiments.train --config mm_tiny`; once more to go on with it."""

import shlex
import sys
from typing import TYPE_CHECKING, Any

from experiments import cli

if TYPE_CHECKING:
    from jaxmem.tasks.base import Task
    from jaxmem.training.run import TrainResult

PROG = "python -m experiments.train"


def main(args: list[str]) -> int:
    """Train the run that the arguments describe; return the exit code."""
    command = [*PROG.split(), *args]
    parsed = cli.parse_run(args, PROG)
    from jaxmem.training.run import train
    from jaxmem.training.stopping import EXIT_PREEMPTED

    def at_end(result: "TrainResult", model: Any, task: "Task") -> None:
        _products(parsed, model, task, shlex.join(command))

    result = train(parsed.config, preset=parsed.preset, command=command, at_end=at_end)
    if result.stopped == "already finished":
        _make_up(parsed, shlex.join(command))
    return EXIT_PREEMPTED if result.stopped == "preempted" else 0


def _products(parsed: cli.Parsed, model: Any, task: "Task", command: str) -> None:
    """Write the plot, what the task leaves, and the card; show a sample to whoever watches.

    What a task without text has found, such as whether a claim holds, is shown wherever it goes.
    """
    from jaxmem.reports.products import make_products

    texts = make_products(parsed.config, parsed.preset, model, task, command=command)
    if texts and (sys.stdout.isatty() or task.tokenizer is None):
        print(f"\n{texts[0]}\n")


def _make_up(parsed: cli.Parsed, command: str) -> None:
    """Make the products of a run that was killed between its last update and its end."""
    from jaxmem.reports.products import missing_products
    from jaxmem.training.model import load_run

    if missing_products(parsed.config):
        run = load_run(parsed.config.run.folder, checkpoint="last")
        _products(parsed, run.model, run.task, command)


if __name__ == "__main__":
    cli.run(main)
