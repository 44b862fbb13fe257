"""Evaluate a run on a whole split: `python -m experiments.evaluate --run runs/mm_tiny`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import cli

if TYPE_CHECKING:
    from jaxmem.data.config import DataConfig
    from jaxmem.training.model import LoadedRun

PROG = "python -m experiments.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Of a text: loss, perplexity and bits over all windows, with 95 % intervals.

    Of other tasks: the loss and metrics that training reported, of the chosen checkpoint.
    """

    run: Path
    """Folder of the run."""
    which: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation loss, or the newest one."""
    split: Literal["validation", "train"] = "validation"
    """Part of the text."""
    data_path: Path | None = None
    """Text or tokens to evaluate on, where they are now; by default `data.path` of the run."""
    batch_size: int = 0
    """Windows at once, speed and memory only; 0 takes the run's batch of one micro-batch."""


def main(args: list[str]) -> int:
    """Evaluate, print, and write evaluate.json into the run folder."""
    options = cli.parse(EvaluateOptions, args, prog=PROG, description=EvaluateOptions.__doc__)
    from jaxmem.errors import ConfigError
    from jaxmem.training.model import load_run

    if options.batch_size < 0:
        raise ConfigError(f"--batch-size {options.batch_size} is negative. Use 0 or more.")
    run = load_run(options.run, checkpoint=options.which)
    about = {"step": run.step, "which": options.which, "split": options.split}
    text = run.task.tokenizer is not None
    result = about | (_of_text(run, options) if text else _of_task(run, options))
    print(_text(options.run, result), flush=True)
    _keep(options.run / "evaluate.json", result)
    return 0


def _of_text(run: "LoadedRun", options: EvaluateOptions) -> dict[str, Any]:
    """Measure a language model on every token of the split, or on its documents' beginnings."""
    from jaxmem.data.pipeline import load_corpus
    from jaxmem.reports.evaluation import evaluate
    from jaxmem.tasks.language_modeling import LanguageModelingConfig

    task, data = run.config.task, run.config.data
    corpus = load_corpus(_moved(data, options.data_path), run.tokenizer)
    sampling = "documents" if data.sampling == "documents" else "windows"
    micro_batch = data.batch_size // run.config.optim.accumulate
    found = evaluate(
        run.model,
        corpus,
        options.split,
        context_len=run.config.model.context_len,
        batch_size=options.batch_size or micro_batch,
        skip_tokens=task.skip_tokens if isinstance(task, LanguageModelingConfig) else 0,
        sampling=sampling,
        begin_of_text=data.begin_of_text,
    )
    about = {"context_len": run.config.model.context_len, "data": corpus.description}
    about["sampling"] = sampling
    return about | found.to_dict()


def _of_task(run: "LoadedRun", options: EvaluateOptions) -> dict[str, Any]:
    """Measure on the batches that training evaluated on; sums there are over micro-batches.

    Raises:
      ConfigError: a flag is given that only a text has a use for.
    """
    from jaxmem.errors import ConfigError
    from jaxmem.training.model import evaluate_batches
    from jaxmem.training.rundata import run_batches

    for flag, value in (("--data-path", options.data_path), ("--batch-size", options.batch_size)):
        if value:
            raise ConfigError(
                f"{flag} {value}: the run's task makes its own data and batches. Leave it out."
            )
    batches = run_batches(run.config, run.task, options.split, "eval")
    count = run.config.run.eval_batches
    found = evaluate_batches(run.task, run.model, (next(batches) for _ in range(count)))
    return {"unit": run.task.unit, "batches": count} | found


def _moved(data: "DataConfig", path: Path | None) -> "DataConfig":
    """Replace the path of the data; a run on built-in data is then read as `auto`."""
    if path is None:
        return data
    from jaxmem.data.config import PATHLESS

    source = "auto" if data.source in PATHLESS else data.source
    return dataclasses.replace(data, source=source, path=str(path))


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Write the result; it has been printed, so a folder that cannot be written is no error."""
    from jaxmem.errors import JaxmemError
    from jaxmem.training.disk import write_atomically

    try:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    except (JaxmemError, OSError) as error:
        reason = error.__cause__ or error
        print(f"note: {path} could not be written: {reason}", file=sys.stderr)


def _text(folder: Path, result: dict[str, Any]) -> str:
    if "windows" in result:
        size = (
            f"{result['tokens']:,} tokens in {result['windows']:,} {result['sampling']} of "
            f"{'at most ' if result['sampling'] == 'documents' else ''}{result['context_len']}"
        )
        names = ("loss", "perplexity", "bits_per_token", "bits_per_character", "bits_per_byte")
    else:
        size = f"{result['count']:,} {result['unit']} in {result['batches']} batches"
        names = [name for name, value in result.items() if isinstance(value, float)]
    checkpoint = f"{result['which']} checkpoint (step {result['step']})"
    lines = [f"{folder}, {checkpoint}, {result['split']} split: {size}"]
    for name in names:
        if name in result:
            low, high = result.get(f"{name}_ci95", (None, None))
            interval = "" if low is None else f"   95 % interval {low:.4f} to {high:.4f}"
            lines.append(f"  {name.replace('_', ' ').ljust(18)} {result[name]:.4f}{interval}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
