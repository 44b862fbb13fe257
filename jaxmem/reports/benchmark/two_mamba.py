"""The suite of linear and squared attention: their rows, and from which length chunks win.

Squared attention has two forms, all pairs of tokens and chunks with a state of K (K + 1) / 2
features. By FLOPs they break even at T = 2 (C + K (K + 1) / 2); the suite measures where they do.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxmem.ops.squared_attention import feature_count
from jaxmem.reports.benchmark import ops, result
from jaxmem.reports.benchmark.cases import Case, find_op, suite
from jaxmem.reports.benchmark.cells import Cell, measure_case
from jaxmem.reports.benchmark.op import Op
from jaxmem.reports.benchmark.two_mamba_ops import CHUNK_SIZES, OPS
from jaxmem.reports.benchmark.work import Ceilings

WIDTHS = (16, 32)
LENGTHS = {"cpu": (128, 256, 512, 1024, 2048), "gpu": (256, 512, 1024, 2048, 4096, 8192)}
PAIRS = "all pairs"
FIELDS = ("forward", "forward_backward")


def run_two_mamba(
    dtype: str, *, budget: float, rounds: int, lengths: Iterable[int] | None = None
) -> result.Result:
    """Measure linear and squared attention, their relatives, and where the square's forms cross.

    Args:
      dtype: of the operands.
      budget: seconds of a sample.
      rounds: rounds of samples.
      lengths: of the rows at which the two forms are compared; None: `LENGTHS` of the device.
    """
    small = jax.default_backend() != "gpu"
    found = ops.run_cases(suite(dtype, small=small, ops=OPS), dtype, budget=budget, rounds=rounds)
    ceilings = Ceilings(found["ceilings"]["copy"], found["ceilings"]["matmul"])
    lengths = LENGTHS["cpu" if small else "gpu"] if lengths is None else tuple(lengths)
    cells: list[Cell] = []
    for case in _crossing(lengths, dtype, small=small):
        print(f"crossover: width {case.shape['K']}, length {case.shape['T']}", file=sys.stderr)
        cells += measure_case(case, ceilings, budget=budget, rounds=rounds)
    rows = [summary(cells, width, size) for width in WIDTHS for size in CHUNK_SIZES]
    crossover = {"cells": cells, "rows": rows}
    return found | {"kind": "two_mamba", "crossover": crossover}


def _crossing(lengths: Iterable[int], dtype: str, *, small: bool) -> list[Case]:
    """Return squared attention at every width and length, in its forms alone."""
    op: Op = find_op("squared_attention")
    op = dataclasses.replace(op, variant="crossover", implementations=())
    shapes = [{"B": 2, "T": t, "H": 4, "K": width} for width in WIDTHS for t in lengths]
    return [Case(op, shape, dtype, small) for shape in shapes]


def summary(cells: Sequence[Cell], width: int, chunk_size: int) -> dict[str, Any]:
    """Return the predicted and the measured lengths at which the forms break even."""
    predicted = 2 * (chunk_size + feature_count(width))
    about = {"width": width, "chunk_size": chunk_size, "predicted": predicted}
    return about | {field: _break_even(cells, width, chunk_size, field) for field in FIELDS}


def _break_even(cells: Sequence[Cell], width: int, chunk_size: int, field: str) -> dict[str, Any]:
    """Return the length from which on chunks are faster, and what they gain at each length.

    Between two lengths the logarithm of the ratio of times is taken as linear in that of the
    length. The length is None if chunks are never faster, and the first measured if always.
    """
    chunks = f"chunks of {chunk_size}"
    times = {
        (cell["shape"]["T"], cell["form"]): cell[field]["ms"]
        for cell in cells
        if cell["shape"]["K"] == width and cell["status"] == "ok"
    }
    lengths = sorted({t for t, form in times if {(t, PAIRS), (t, chunks)} <= times.keys()})
    gains = {t: times[t, PAIRS] / times[t, chunks] for t in lengths}
    slower = [t for t in lengths if gains[t] < 1.0]
    if not slower:
        return {"length": lengths[0] if lengths else None, "gains": gains}
    after = [t for t in lengths if t > slower[-1]]
    if not after:
        return {"length": None, "gains": gains}
    low, high = slower[-1], after[0]
    share = -math.log(gains[low]) / math.log(gains[high] / gains[low])
    return {"length": round(low * (high / low) ** share), "gains": gains}
