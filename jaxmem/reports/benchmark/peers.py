"""Other packages beside ours: each in a process of its own, with our inputs and our gate.

The scripts stand in `benchmarks/peers` of a checkout; a peer that is not installed is skipped.
"""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.reports.benchmark import result
from jaxmem.reports.benchmark.cases import Case, find_op
from jaxmem.reports.benchmark.cells import cotangent_of, exact_of, tolerance
from jaxmem.reports.benchmark.work import Ceilings, floor_ms

# Op -> script -> peer's package.
PEERS = {"gated_scan": ("gated_scans", ("accelerated_scan", "fla"))}


def with_peers(found: result.Result, *, budget: float, rounds: int) -> result.Result:
    """Add the cells of all peers of the ops of a result; without a GPU say that there are none."""
    if jax.default_backend() != "gpu":
        print("peers are measured on a GPU only: none", file=sys.stderr)
        return found
    ceilings = Ceilings(found["ceilings"]["copy"], found["ceilings"]["matmul"])
    cells, done = [], set()
    for cell in found["cells"]:
        key = json.dumps([cell["op"], cell["shape"]])
        if cell["op"] not in PEERS or key in done:
            continue
        done.add(key)
        case = Case(find_op(cell["op"]), cell["shape"], cell["dtype"], cell["small"])
        cells += _measure(case, ceilings, budget=budget, rounds=rounds)
    return found | {"cells": found["cells"] + cells}


def _measure(case: Case, ceilings: Ceilings, *, budget: float, rounds: int) -> list[dict]:
    script, packages = PEERS[case.op.name]
    present = [package for package in packages if find_spec(package)]
    for package in set(packages) - set(present):
        print(f"peer {package} is not installed: skipped", file=sys.stderr)
    if not present:
        return []
    if find_spec("benchmarks.peers") is None:
        print("peers are measured from a checkout, which has benchmarks/peers", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        cotangent = cotangent_of(case)
        arrays: dict[str, Any] = {"cotangent": np.asarray(cotangent, np.float32)}
        arrays |= {name: np.asarray(x, np.float32) for name, x in case.operands.items()}
        arrays |= {f"expected_{n}": x for n, x in enumerate(exact_of(case, cotangent))}
        np.savez(path, **arrays)
        options = ["--inputs", str(path), "--dtype", case.dtype, "--budget", str(budget)]
        options += ["--rounds", str(rounds), "--tolerance", str(tolerance(case.dtype))]
        return [_cell(case, package, script, options, ceilings) for package in present]


def _cell(
    case: Case, package: str, script: str, options: list[str], ceilings: Ceilings
) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.peers.{script}", "--peer", package, *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    cell = {"op": case.op.name, "shape": case.shape, "dtype": case.dtype, "small": case.small}
    cell |= {"form": package, "tolerance": tolerance(case.dtype)}
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return cell | {"status": "skipped", "reason": f"its process failed: {last}"}
    cell |= json.loads(ran.stdout.splitlines()[-1])
    for field, work in (("forward", case.work.forward), ("forward_backward", case.work.both)):
        if field in cell:
            floor = floor_ms(work, ceilings)
            cell[field] |= {"floor_ms": floor, "of_floor": floor / cell[field]["ms"]}
    return cell
