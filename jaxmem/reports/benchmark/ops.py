"""Benchmarks of single ops, at the shapes of the suite or over a range of lengths."""

import sys
from collections.abc import Sequence

import jax

from jaxmem.errors import ConfigError
from jaxmem.reports.benchmark import result, timing
from jaxmem.reports.benchmark.cases import Case, at_lengths, suite, variants
from jaxmem.reports.benchmark.cells import measure_case

LONGEST = 2**20


def run_suite(dtype: str, *, budget: float, rounds: int) -> result.Result:
    """Measure every op at its shapes; at small ones without a GPU."""
    return run_cases(suite(dtype, small=_small()), dtype, budget=budget, rounds=rounds)


def run_op(
    name: str, lengths: Sequence[int], dtype: str, *, budget: float, rounds: int
) -> result.Result:
    """Measure an op, in all its variants, over lengths, or at its shapes if there are none.

    Raises:
      UnknownName: there is no such op.
    """
    uses, small = variants(name), _small()
    cases = suite(dtype, small=small, ops=uses)
    if lengths:
        cases = [case for op in uses for case in at_lengths(op, lengths, dtype, small=small)]
    return run_cases(cases, dtype, budget=budget, rounds=rounds)


def default_dtype() -> str:
    """Return what is usual on the device: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def parse_lengths(text: str) -> list[int]:
    """Return the lengths from the first by doubling to the last, `512:32k` or just `2048`.

    Raises:
      ConfigError: this is no such range.
    """
    first, _, last = text.partition(":")
    try:
        low = _length(first)
        high = _length(last) if last else low
    except ValueError:
        low = high = 0
    if not 0 < low <= high <= LONGEST:
        raise ConfigError(
            f"--lengths {text} is no range of lengths up to {LONGEST}. "
            "Write FIRST:LAST, such as 512:32k, or one length."
        )
    return [low << n for n in range((high // low).bit_length())]


def _length(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)


def _small() -> bool:
    return jax.default_backend() != "gpu"


def run_cases(cases: Sequence[Case], dtype: str, *, budget: float, rounds: int) -> result.Result:
    """Measure the ceilings of the device and these cases."""
    ceilings = timing.measure_ceilings(dtype)
    cells = []
    for number, case in enumerate(cases, 1):
        shape = " ".join(f"{letter}{size}" for letter, size in case.shape.items())
        print(f"[{number}/{len(cases)}] {case.op.label} {shape} {dtype}", file=sys.stderr)
        cells += measure_case(case, ceilings, budget=budget, rounds=rounds)
    about = {"kind": "ops", "ceilings": ceilings._asdict() | {"dtype": dtype}}
    return result.environment() | about | {"cells": cells}
