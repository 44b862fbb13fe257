"""Measure ops and training steps: `python -m experiments.benchmark --suite kernels`."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import cli

if TYPE_CHECKING:
    from jaxmem.reports.benchmark.result import Result

PROG = "python -m experiments.benchmark"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Times, errors, memory and compiled kernels, as a table and as JSON.

    Nothing is timed before its result and its gradients agree with float64.
    """

    op: str | None = None
    """Measure this op in all its variants, at its shapes or over --lengths."""
    lengths: str | None = None
    """Lengths for --op, doubling from the first to the last: 512:32k."""
    suite: Literal["kernels", "memory_mosaics", "two_mamba"] | None = None
    """Measure all ops, or training steps of Memory Mosaics beside the published ones, or linear and
    squared attention and where the forms of the latter cross."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the operands of ops; auto: bfloat16 on a GPU, float32 on a CPU."""
    rounds: int = 3
    """Rounds in which the implementations take turns."""
    peers: bool = False
    """With ops on a GPU: measure other packages too, if they are installed."""
    peer_checkout: Path | None = None
    """With --peers: checkout of the 2Mamba authors' code, whose kernels are measured too."""
    compile_report: bool = False
    """Tell what the compiler said of every kernel, and compile whole training steps for a GPU that
    need not be here."""
    compile_lock: Literal["changed", "all"] | None = None
    """Compile kernels (those of the kernel --op) for GPUs that need not be here, and write what the
    compiler says beside the launch tables: those that changed, or all."""
    tune: bool = False
    """On a GPU: search launch configurations (of the kernel --op) and write its tables."""
    out: Path | None = None
    """File for the result as JSON."""


def main(args: list[str]) -> int:
    """Measure, print the table, and write the JSON."""
    options = cli.parse(BenchmarkOptions, args, prog=PROG, description=BenchmarkOptions.__doc__)
    _check(options)
    if options.compile_report or options.compile_lock:  # no device, and JAX would look for one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxmem.reports.benchmark import result

    found = _run(options)
    if options.out is not None:
        result.write(found, options.out)
    print(result.table(found), flush=True)
    return 0


def _check(options: BenchmarkOptions) -> None:
    from jaxmem.errors import ConfigError

    kernels = bool(options.compile_lock) + options.tune
    suites = bool(options.suite) + options.compile_report + kernels
    if suites + bool(options.op and not kernels) != 1:
        raise ConfigError(
            "Choose what to measure: one of --op NAME, --suite NAME, --compile-report, "
            "--compile-lock WHICH and --tune."
        )
    if options.lengths and (options.op is None or kernels):
        raise ConfigError("--lengths is for --op NAME, which measures one op over lengths.")
    if options.peer_checkout is not None and not options.peers:
        raise ConfigError("--peer-checkout is for --peers, which measures other code beside ours.")
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} measures nothing. Use 1 or more.")


def _run(options: BenchmarkOptions) -> "Result":
    if options.compile_report:
        from jaxmem.reports.benchmark.compiled import compile_report

        return compile_report(_mosaics())
    if options.compile_lock:
        from jaxmem.reports.benchmark.compiled import renew_locks

        return renew_locks(options.compile_lock, options.op)
    if options.tune:
        from jaxmem.reports.benchmark.tune import tune

        return tune(options.op)
    if options.suite == "memory_mosaics":
        from jaxmem.reports.benchmark.mosaics import run_mosaics

        return run_mosaics(_mosaics(), rounds=options.rounds)
    from jaxmem.reports.benchmark import ops, timing

    dtype = ops.default_dtype() if options.dtype == "auto" else options.dtype
    measured = {"budget": timing.BUDGET, "rounds": options.rounds}
    if options.suite == "two_mamba":
        from jaxmem.reports.benchmark.two_mamba import run_two_mamba

        found = run_two_mamba(dtype, **measured)
    elif options.op is None:
        found = ops.run_suite(dtype, **measured)
    else:
        lengths = ops.parse_lengths(options.lengths) if options.lengths else []
        found = ops.run_op(options.op, lengths, dtype, **measured)
    if options.peers:
        from jaxmem.reports.benchmark.peers import with_peers

        found = with_peers(found, checkout=options.peer_checkout, **measured)
    return found


def _mosaics() -> "dict[str, Any]":
    import configs
    from jaxmem.reports.benchmark.mosaics import PRESETS

    return {name: configs.load(name).model for name in PRESETS}


if __name__ == "__main__":
    cli.run(main)
