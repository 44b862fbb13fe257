"""Train a model: `python -m experiments.train --config mm_tiny`; once more to go on with it."""

import shlex
import sys
from typing import TYPE_CHECKING, Any

from experiments import cli

if TYPE_CHECKING:
    from jaxmem.training.run import TrainResult

PROG = "python -m experiments.train"


def main(args: list[str]) -> int:
    """Train the run that the arguments describe; return the exit code."""
    command = [*PROG.split(), *args]
    parsed = cli.parse_run(args, PROG)
    from jaxmem.training.run import train
    from jaxmem.training.stopping import EXIT_PREEMPTED

    def at_end(result: "TrainResult", model: Any, tokenizer: Any) -> None:
        _products(parsed, model, tokenizer, shlex.join(command))

    result = train(parsed.config, preset=parsed.preset, command=command, at_end=at_end)
    if result.stopped == "already finished":
        _make_up(parsed, shlex.join(command))
    return EXIT_PREEMPTED if result.stopped == "preempted" else 0


def _products(parsed: cli.Parsed, model: Any, tokenizer: Any, command: str) -> None:
    """Write the plot, the samples and the card; show a sample to whoever watches."""
    from jaxmem.reports.products import make_products

    texts = make_products(parsed.config, parsed.preset, model, tokenizer, command=command)
    if texts and sys.stdout.isatty():
        print(f"\n{texts[0]}\n")


def _make_up(parsed: cli.Parsed, command: str) -> None:
    """Make the products of a run that was killed between its last update and its end."""
    from jaxmem.reports.products import missing_products
    from jaxmem.training.model import load_run

    folder = parsed.config.run.folder
    if missing_products(folder):
        run = load_run(folder, checkpoint="last")
        _products(parsed, run.model, run.tokenizer, command)


if __name__ == "__main__":
    cli.run(main)
