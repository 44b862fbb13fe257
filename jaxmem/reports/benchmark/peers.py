"""Other packages beside ours: each in a process of its own, with our inputs and our gate.

The scripts stand in `benchmarks/peers` of a checkout; a peer that is not installed is skipped.
"""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.reports.benchmark import result
from jaxmem.reports.benchmark.cases import Case, find_op
from jaxmem.reports.benchmark.cells import cotangent_of, exact_of, tolerance
from jaxmem.reports.benchmark.work import Ceilings, floor_ms


class Peer(NamedTuple):
    """Another implementation of a use of an op."""

    script: str
    """Module of `benchmarks.peers` that measures it."""
    name: str
    """By which that script and the table know it."""
    package: str | None
    """That must be installed; None: it needs the authors' checkout."""


PEERS = {
    ("gated_scan", ""): (
        Peer("gated_scans", "accelerated_scan", "accelerated_scan"),
        Peer("gated_scans", "fla", "fla"),
    ),
    ("linear_attention", ""): (
        Peer("linear_attentions", "fla chunk_simple_gla", "fla"),
        Peer("linear_attentions", "mlstm_kernels", "mlstm_kernels"),
    ),
    ("linear_attention", "no decay"): (Peer("linear_attentions", "fla chunk_linear_attn", "fla"),),
    ("linear_attention", "retention"): (Peer("linear_attentions", "fla chunk_retention", "fla"),),
    ("linear_attention", "Mamba-2"): (Peer("linear_attentions", "fla chunk_simple_gla", "fla"),),
    ("squared_attention", ""): (Peer("two_mamba", "2Mamba", None),),
    ("attention", "2Mamba-E"): (Peer("two_mamba", "2Mamba-E", None),),
}
"""By op and variant."""


def with_peers(
    found: result.Result, *, checkout: Path | None = None, budget: float, rounds: int
) -> result.Result:
    """Add the cells of all peers of the ops of a result; without a GPU say that there are none.

    Args:
      found: result of ops.
      checkout: of the 2Mamba authors' code; None: their kernels are not measured.
      budget: seconds of a sample.
      rounds: rounds of samples.
    """
    if jax.default_backend() != "gpu":
        print("peers are measured on a GPU only: none", file=sys.stderr)
        return found
    ceilings = Ceilings(found["ceilings"]["copy"], found["ceilings"]["matmul"])
    cells, done = [], set()
    for cell in found["cells"]:
        use = (cell["op"], cell["variant"])
        key = json.dumps([use, cell["shape"]])
        if use not in PEERS or key in done:
            continue
        done.add(key)
        case = Case(find_op(*use), cell["shape"], cell["dtype"], cell["small"])
        cells += _measure(case, ceilings, checkout, budget=budget, rounds=rounds)
    return found | {"cells": found["cells"] + cells}


def _measure(
    case: Case, ceilings: Ceilings, checkout: Path | None, *, budget: float, rounds: int
) -> list[dict]:
    present = []
    for peer in PEERS[case.op.name, case.op.variant]:
        absent = _absent(peer, checkout)
        if absent is None:
            present.append(peer)
        else:
            print(f"peer {peer.name} {absent}: skipped", file=sys.stderr)
    if not present:
        return []
    if find_spec("benchmarks.peers") is None:
        print("peers are measured from a checkout, which has benchmarks/peers", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        cotangent = cotangent_of(case)
        arrays: dict[str, Any] = {"cotangent": np.asarray(cotangent, np.float32)}
        arrays["float32"] = np.array([n for n, x in case.operands.items() if x.dtype == "float32"])
        arrays |= {name: np.asarray(x, np.float32) for name, x in case.operands.items()}
        arrays |= {f"expected_{n}": x for n, x in enumerate(exact_of(case, cotangent))}
        np.savez(path, **arrays)
        options = ["--inputs", str(path), "--dtype", case.dtype, "--budget", str(budget)]
        options += ["--rounds", str(rounds), "--tolerance", str(tolerance(case.dtype))]
        return [_cell(case, peer, checkout, options, ceilings) for peer in present]


def _absent(peer: Peer, checkout: Path | None) -> str | None:
    """Say why a peer cannot be measured, or None."""
    if peer.package is None:
        return "needs --peer-checkout" if checkout is None else None
    return None if find_spec(peer.package) else "is not installed"


def _cell(
    case: Case, peer: Peer, checkout: Path | None, options: list[str], ceilings: Ceilings
) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.peers.{peer.script}", "--peer", peer.name]
    if peer.package is None:
        command += ["--checkout", str(checkout)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    cell = {"op": case.op.name, "variant": case.op.variant, "shape": case.shape}
    cell |= {"dtype": case.dtype, "small": case.small}
    cell |= {"form": peer.name, "tolerance": tolerance(case.dtype)}
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return cell | {"status": "skipped", "reason": f"its process failed: {last}"}
    cell |= json.loads(ran.stdout.splitlines()[-1])
    for field, work in (("forward", case.work.forward), ("forward_backward", case.work.both)):
        if field in cell:
            floor = floor_ms(work, ceilings)
            cell[field] |= {"floor_ms": floor, "of_floor": floor / cell[field]["ms"]}
    return cell
