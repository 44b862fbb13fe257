"""Export a run's weights: `python -m experiments.export --run runs/mm_tiny --out w.safetensors`."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import cli

PROG = "python -m experiments.export"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the parameters of a run as safetensors, by the names that its model has elsewhere.

    `jaxmem.interop.weights.load_weights(model, path)` reads such a file, or one of the authors'.
    """

    run: Path
    """Folder of the run."""
    out: Path
    """File to write; one that is there is replaced."""
    which: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation loss, or the newest one."""
    names: str = "auto"
    """Whose names: jaxmem (ours), or a release of `jaxmem.interop.families.FAMILIES`; auto takes
    those of a release that computes what the model does, and ours if there is none."""


def main(args: list[str]) -> int:
    """Write the file and say what is in it."""
    options = cli.parse(ExportOptions, args, prog=PROG, description=ExportOptions.__doc__)
    from jaxmem.errors import ConfigError
    from jaxmem.interop.weights import read_tensors, save_weights
    from jaxmem.training.model import load_run

    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out} is a folder, or in one that is not there.")
    run = load_run(options.run, checkpoint=options.which)
    names = save_weights(run.model, options.out, names=options.names)
    tensors = read_tensors(options.out)
    print(
        f"{options.out}: {len(tensors)} tensors, {options.out.stat().st_size / 2**20:.1f} MiB, "
        f"{options.which} checkpoint (step {run.step}) of {options.run}, names of {names}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
