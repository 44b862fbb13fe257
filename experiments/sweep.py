"""Train every cell of a suite with every seed: `python -m experiments.sweep --suite smoke`."""

import dataclasses
import fnmatch
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments import cli
from experiments.train import PROG as TRAIN

if TYPE_CHECKING:
    from jaxmem.reports.sweep import Outcome
    from jaxmem.reports.sweep_runner import Ending
    from jaxmem.reports.sweep_suite import Cell, Suite
    from jaxmem.training.config import RunConfig

PROG = "python -m experiments.sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train what a suite names, and compare it: results.csv, results.md and results.png.

    The same command again goes on where it was stopped: finished runs are kept, begun ones are
    resumed, failed ones tried again. --list shows the suites.
    """

    suite: str
    """A suite's name, or a .py file that defines `suite`."""
    out: Path | None = None
    """Folder for the results and the runs, by default `runs/NAME`."""
    jobs: int = 1
    """Runs at the same time. On one GPU they share its memory: set
    XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    only: str | None = None
    """Train only the runs that match: a label, LABEL_SEED, or a pattern such as 'gpt*'."""


class Planned(NamedTuple):
    """One run of the suite."""

    cell: "Cell"
    seed: int
    folder: Path
    config: "RunConfig | None"
    """None if the flags of the cell do not make one."""
    error: str
    """Why they do not, else empty."""

    @property
    def command(self) -> list[str]:
        """The arguments of `experiments.train`."""
        run = ["--run.seed", str(self.seed), "--run.dir", str(self.folder)]
        run += ["--run.name", self.folder.name]
        return ["--config", self.cell.preset, *self.cell.flags, *run]


def main(args: list[str]) -> int:
    """Run what is not finished, write the results, and print them; 1 if a run failed."""
    command = shlex.join([*PROG.split(), *args])
    options = cli.parse(SweepOptions, args, prog=PROG, description=SweepOptions.__doc__)
    from configs import suites
    from jaxmem.errors import ConfigError
    from jaxmem.training.stopping import EXIT_PREEMPTED

    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs} runs nothing. Use 1 or more.")
    suite = suites.load(options.suite)
    out = options.out or Path("runs") / Path(options.suite).stem
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file. Choose a folder.")
    plan = [one for cell in suite.cells for one in _planned(cell, suite, out)]
    sweep = _Sweep(suite, plan, out, command)
    done = sweep.run(_chosen(plan, options.only), options.jobs)
    outcomes = sweep.outcomes()
    from jaxmem.reports.sweep import summary

    print(f"\n{summary(suite, outcomes)}\n\nEverything is in {out}.", flush=True)
    if not done:
        print("Stopped; the same command goes on.", flush=True)
        return EXIT_PREEMPTED
    return int(any(one.status == "failed" for one in outcomes))


def _planned(cell: "Cell", suite: "Suite", out: Path) -> list[Planned]:
    """Resolve a cell once, and name the runs of its seeds."""
    from jaxmem.errors import JaxmemError

    config, error = None, ""
    try:
        config = cli.parse_run(["--config", cell.preset, *cell.flags], TRAIN).config
    except JaxmemError as problem:
        error = " ".join(str(problem).split())
    plan = []
    for seed in suite.seeds:
        folder = out / "runs" / f"{cell.label}_{seed}"
        if config is not None:
            run = dataclasses.replace(config.run, seed=seed, dir=str(folder), name=folder.name)
            config = dataclasses.replace(config, run=run)
        plan.append(Planned(cell, seed, folder, config, error))
    return plan


def _chosen(plan: list[Planned], pattern: str | None) -> list[Planned]:
    """Return the runs that --only names.

    Raises:
      ConfigError: there is none.
    """
    from jaxmem.errors import ConfigError

    if pattern is None:
        return plan
    chosen = [
        one
        for one in plan
        if any(fnmatch.fnmatchcase(n, pattern) for n in (one.cell.label, one.folder.name))
    ]
    if not chosen:
        labels = ", ".join(dict.fromkeys(one.cell.label for one in plan))
        raise ConfigError(f"--only {pattern!r} matches no run. The labels are {labels}.")
    return chosen


class _Sweep:
    """What is known of the runs, and the files that say it."""

    def __init__(self, suite: "Suite", plan: list[Planned], out: Path, command: str):
        self._suite = suite
        self._plan = plan
        self._out = out
        self._command = command
        self._errors = {one.folder: one.error for one in plan}

    def run(self, chosen: list[Planned], at_once: int) -> bool:
        """Train; return False if a signal stopped it."""
        from jaxmem.reports.sweep_runner import Job, run_jobs

        self._write()
        jobs = []
        for one in chosen:
            if one.config is None:
                self._say(f"{one.folder}: failed: {one.error}")
            else:
                jobs.append(Job(one.config, [sys.executable, *TRAIN.split()[1:], *one.command]))
        return run_jobs(
            jobs,
            at_once=at_once,
            errors=self._out / "errors",
            ended=self._ended,
            say=self._say,
        )

    def outcomes(self) -> list["Outcome"]:
        """Read all runs of the suite, in its order."""
        from jaxmem.reports.sweep import read_outcome
        from jaxmem.reports.sweep_runner import is_finished

        return [
            read_outcome(
                one.cell,
                one.seed,
                metric=self._suite.metric,
                steps=one.config.run.steps if one.config else 0,
                folder=one.folder,
                command=shlex.join([*TRAIN.split(), *one.command]),
                finished=one.config is not None and is_finished(one.config),
                error=self._errors[one.folder],
            )
            for one in self._plan
        ]

    def _ended(self, ending: "Ending") -> None:
        folder = ending.job.folder
        self._errors[folder] = ending.error
        words = "finished" if ending.began else "finished before"
        self._say(f"{folder}: {f'failed: {ending.error}' if ending.error else words}")
        if ending.began:
            self._write()

    def _write(self) -> None:
        from jaxmem.reports.sweep import write_results

        write_results(self._out, self._suite, self.outcomes(), self._command)

    def _say(self, line: str) -> None:
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
