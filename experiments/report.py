"""Put runs side by side: `python -m experiments.report runs/mm_tiny runs/gpt_tiny`."""

import dataclasses
import shlex
from pathlib import Path

import tyro

from experiments import cli

PROG = "python -m experiments.report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write report.md, report.csv and report.png: results, what differs, and the curves.

    Runs that differ in the seed only are averaged.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, in the order of the tables."""
    out: Path = Path("report")
    """Folder to write to."""


def main(args: list[str]) -> int:
    """Read the folders, write the files, and print the table of results."""
    command = shlex.join([*PROG.split(), *args])
    options = cli.parse(ReportOptions, args, prog=PROG, description=ReportOptions.__doc__)
    from jaxmem.errors import ConfigError
    from jaxmem.reports.runs_report import read_run, write_report

    if not options.runs:
        raise ConfigError("No run folder is named. Give one or more, such as runs/*.")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file. Choose a folder.")
    folders = {folder.resolve(): folder for folder in options.runs}  # each once
    runs = [read_run(folder) for folder in folders.values()]
    print(f"{write_report(runs, options.out, command)}\n\nEverything is in {options.out}.")
    return 0


if __name__ == "__main__":
    cli.run(main)
