"""Compare this project with golden files: `python -m tests.golden.check DIR... [--float32]`.

Every `.npz` under the folders is rebuilt from its `meta`, given its `param/*` by the original
names, run, and compared with its `output/*` and `grad/*`. Exit status 0 only if every file passed.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Precision = Literal["float64", "float32"]
Measure = Callable[[np.ndarray, np.ndarray], float]

ROUNDING = 1e-12
"""An array whose largest entry is below this is zero up to rounding, and compared absolutely."""


class Limits(NamedTuple):
    """Largest errors of a file's outputs and gradients."""

    outputs: float
    gradients: float


LIMITS: dict[Precision, Limits] = {
    "float64": Limits(outputs=1e-6, gradients=1e-6),  # files store float64 results as float32
    "float32": Limits(outputs=5e-6, gradients=5e-5),
}


def largest(got: np.ndarray, want: np.ndarray) -> float:
    """Return max|a-b| / max|b|."""
    return _max(got - want) / _max(want)


def frobenius(got: np.ndarray, want: np.ndarray) -> float:
    """Return ‖a-b‖ / ‖b‖."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def at_least_one(got: np.ndarray, want: np.ndarray) -> float:
    """Return max|a-b| / max(1, max|b|)."""
    return _max(got - want) / max(1.0, _max(want))


def absolute(got: np.ndarray, want: np.ndarray) -> float:
    """Return max|a-b|."""
    return _max(got - want)


def per_entry(got: np.ndarray, want: np.ndarray, *, floor: float) -> float:
    """Return max |a-b| / (|b| + floor): rtol with atol = rtol · floor."""
    return _max((got - want) / (np.abs(want) + floor))


def _max(a: np.ndarray) -> float:
    return float(np.max(np.abs(a), initial=0.0))


MEASURES: dict[str, Measure] = {"diagonal_batching": frobenius, "mka": at_least_one}
"""How a system's errors are measured where it is not by `largest`."""


class Exemption(NamedTuple):
    """A figure from the README of a set that is looser than LIMITS, in float32 only."""

    system: str
    applies: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], bool]
    """From meta and arrays of a file to whether it is of the kind that the README names."""
    arrays: str
    """Regular expression of the keys concerned."""
    limit: float
    measure: Measure | None = None
    """None: the system's own."""


def _extreme_decay(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """A leaky average with a head that never forgets (rate 0) or always does (rate 20 or more)."""
    if meta.get("module") != "leaky average":
        return False
    rate = np.abs(10 * arrays["param/leaky_beta"])
    return bool(np.any((rate == 0) | (rate >= 20)))


def _training_run(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    return "optimizer" in meta


def _clamped_scale(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """A memory of the Library with a head at the limit of its scale, e^10 for the logits."""
    scales = [a for name, a in arrays.items() if re.fullmatch(r"param/(.*\.)?kernel_beta", name)]
    return any(np.max(scale) >= 0.5 for scale in scales)


def _normalised_moons(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """A memory of three moons that divides keys by their length."""
    return str(meta.get("module")).startswith("ThreeMoons") and bool(meta.get("norm_keys"))


def _polynomial(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """Attention with a sum of powers, whose terms cancel below 0."""
    return bool(re.search("taylor|learned_terms|poly_", str(meta.get("attention_type"))))


def _authors_are_off(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """A file that says of the authors' own float32 gradients that they miss the usual limit."""
    errors = meta.get("float32_upstream_rel_err") or {}
    return errors.get("grad", 0.0) > LIMITS["float32"].gradients


EXEMPTIONS = (
    # As the README of the set has it. Measured 1.5e-6 and 2.8e-4 (orders 2 to 4 of the latter).
    Exemption("two_mamba", _polynomial, r"output/.*", 1e-4),
    Exemption("two_mamba", _polynomial, r"grad/.*", 1e-3),
    # As the README of the set has it: the first weights of a row are small squares, by whose sum
    # it is divided. Measured 9.8e-5 on one processor and below 5e-5 on another; the authors' own
    # float32 run is 8.2e-5 off.
    Exemption("two_mamba", _authors_are_off, r"grad/.*", 8e-4),
    # Decay gradients of such heads differ by 30 orders of magnitude: per head rtol 1e-3, atol 1e-5.
    # Measured 2.5e-4, at rate 1e-5, where the quotient of two long sums cancels.
    Exemption(
        "memory_mosaics", _extreme_decay, r"grad/leaky_beta", 1e-3, partial(per_entry, floor=1e-2)
    ),
    # AdamW divides a gradient by its own size, which magnifies rounding. Measured 5e-8.
    Exemption("memory_mosaics", _training_run, r"output/final/.*", 1e-5, absolute),
    # Such a scale magnifies the rounding of a cosine. Measured 1.7e-4 and 2.9e-3; the authors' own
    # float32 run is 2e-4 and 3e-3 off.
    Exemption("memory_mosaics", _clamped_scale, r"output/.*", 1e-3),
    Exemption("memory_mosaics", _clamped_scale, r"grad/.*", 1e-2),
    # Each step feeds on the one before, and dividing by a short length magnifies what it gets; the
    # authors' own float32 run is 3e-5 off. Measured 5.1e-5.
    Exemption("memory_mosaics", _normalised_moons, r"output/generated_cached", 1e-4),
    # One number, the sum of all key gradients, which nearly cancel (2e-4 is left). Measured 1.0e-4.
    Exemption("memory_mosaics", _normalised_moons, r"grad/k_scale", 3e-4),
)


class Criterion(NamedTuple):
    """How one array is compared."""

    measure: Measure
    limit: float


def criterion(
    system: str,
    key: str,
    precision: Precision,
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Criterion:
    """Return the measure and the limit of one array of a file."""
    limits = LIMITS[precision]
    limit = limits.outputs if key.startswith("output/") else limits.gradients
    usual = MEASURES.get(system, largest)
    if precision == "float32":
        for rule in EXEMPTIONS:
            found = rule.system == system and re.fullmatch(rule.arrays, key)
            if found and rule.applies(meta, arrays):
                return Criterion(rule.measure or usual, rule.limit)
    return Criterion(usual, limit)


def error(got: np.ndarray, want: np.ndarray, measure: Measure) -> float:
    """Return the error of one array; infinite for another shape, NaN, or any other integer."""
    if got.shape != want.shape or not np.all(np.isfinite(got)):
        return math.inf
    if not np.issubdtype(want.dtype, np.floating):
        return 0.0 if np.array_equal(got, want) else math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    return measure(got, want) if _max(want) > ROUNDING else absolute(got, want)


class Worst(NamedTuple):
    """The array of a group that comes closest to its limit, or exceeds it most."""

    key: str = ""
    error: float = 0.0
    limit: float = math.inf

    @property
    def share(self) -> float:
        """Return how much of its limit the array uses."""
        return self.error / self.limit

    def __str__(self) -> str:
        return f"{self.error:.1e}" if self.key else "-"


class Result(NamedTuple):
    """What the table says about one file."""

    file: str
    verdict: Literal["passed", "failed", "unsupported"]
    outputs: Worst = Worst()
    gradients: Worst = Worst()
    reason: str = ""
    trace: str = ""


def check_file(path: Path, precision: Precision) -> Result:
    """Compare one file; whatever goes wrong becomes a result, so that the others still run."""
    import jax

    from tests.golden import adapters

    file = f"{path.absolute().parent.name}/{path.stem}"
    try:
        with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
            golden = adapters.load(path)
            system, adapter = adapters.find(golden)
            runs = adapter.compute(golden, np.dtype(precision))
    except adapters.Unsupported as why:
        return Result(file, "unsupported", reason=str(why))
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        return Result(file, "failed", reason=reason, trace=traceback.format_exc())
    criteria = {
        key: criterion(system, key, precision, golden.meta, golden.arrays)
        for key in golden.arrays
        if key.startswith(("output/", "grad/"))
    }
    return compare(file, golden.arrays, runs, criteria)


def compare(
    file: str,
    wanted: Mapping[str, np.ndarray],
    runs: Iterable[Mapping[str, np.ndarray]],
    criteria: Mapping[str, Criterion],
) -> Result:
    """Compare every array of a file with those of each run (one per implementation)."""
    worst = {"output": Worst(), "grad": Worst()}
    reasons = []
    if not criteria:
        return Result(file, "failed", reason="the file has no output/* or grad/* to compare")
    for run in runs:
        for key, (measure, limit) in criteria.items():
            size = error(run[key], wanted[key], measure) if key in run else math.inf
            this = Worst(key, size, limit)
            if not size <= limit:
                missing = "" if key in run else " (not computed)"
                reasons.append(f"{key} {this} > {limit:.0e}{missing}")
            group = key.partition("/")[0]
            worst[group] = max(worst[group], this, key=lambda w: (w.share, w.key))
    verdict = "failed" if reasons else "passed"
    return Result(file, verdict, worst["output"], worst["grad"], "; ".join(reasons))


def check_files(paths: list[Path], precision: Precision, jobs: int) -> Iterable[Result]:
    """Yield the results of all files in order, from `jobs` worker processes."""
    if jobs == 1 or len(paths) == 1:
        yield from (check_file(path, precision) for path in paths)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=context) as pool:
        yield from pool.map(check_file, paths, [precision] * len(paths))


def find_files(folders: Iterable[Path], only: str) -> list[Path]:
    """Return the golden files under the folders whose names match, sorted within each folder."""
    found = [path for folder in folders for path in sorted(folder.glob("**/*.npz"))]
    return [path for path in dict.fromkeys(found) if re.search(only, path.stem)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.check", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--float32", action="store_true", help="compute in float32, not float64")
    parser.add_argument("--only", default="", metavar="REGEX", help="files whose name matches")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of a crash")
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder. Pass folders that hold golden files.")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not positive. Use 1 or more.")
    args.files = find_files(args.folders, args.only)
    if not args.files:
        parser.error(f"no .npz file under the given folders matches {args.only!r}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the table and return the exit status."""
    args = parse(argv)
    # Compilation is the cost here, but unoptimised products round worse: up to five times the error
    # of float32 gradients. JAX reads both variables when it is first imported.
    if not args.float32:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    width = max(len(f"{p.absolute().parent.name}/{p.stem}") for p in args.files)
    print(f"{'file':{width}}  outputs  gradients  verdict")
    counts = dict.fromkeys(("passed", "failed", "unsupported"), 0)
    for result in check_files(args.files, "float32" if args.float32 else "float64", args.jobs):
        counts[result.verdict] += 1
        reason = f": {result.reason}" if result.reason else ""
        errors = f"{result.outputs!s:>7}  {result.gradients!s:>9}"
        print(f"{result.file:{width}}  {errors}  {result.verdict}{reason}", flush=True)
        if args.verbose and result.trace:
            print(result.trace, flush=True)
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    return 0 if counts["passed"] == len(args.files) else 1


if __name__ == "__main__":
    sys.exit(main())
