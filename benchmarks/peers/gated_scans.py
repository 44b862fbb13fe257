"""Time of other packages' gated scans on the inputs of `experiments.benchmark`; needs PyTorch.

Each call runs as a captured CUDA graph, so its time is device time. Inputs are laid out as the
package wants them before anything is timed. The result is checked before it is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def main() -> None:
    """Check, time, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=("accelerated_scan", "fla"), required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--tolerance", type=float, required=True)
    args = parser.parse_args()
    data = np.load(args.inputs)
    dtype = getattr(torch, args.dtype)
    x, log_decay, cotangent = (
        torch.tensor(data[name], device="cuda", dtype=dtype)
        for name in ("x", "log_decay", "cotangent")
    )
    prepare = {"accelerated_scan": accelerated_scan, "fla": fla}[args.peer]
    forward, operands, cotangent, order = prepare(x, log_decay, cotangent)

    def both() -> tuple[torch.Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, operands, cotangent)

    errors = {}
    names = ("out", "dx", "dlog_decay")
    for name, found, expected in zip(names, both(), range(3), strict=True):
        exact = data[f"expected_{expected}"]
        difference = order(name, found).double().cpu().numpy() - exact
        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    cell: dict[str, Any] = {"errors": errors}
    worst = max(errors.values())
    if not worst <= args.tolerance:
        reason = f"not timed: error {worst:.1e} exceeds {args.tolerance:.0e}"
        print(json.dumps(cell | {"status": "incorrect", "reason": reason}))
        return
    for field, call in (("forward", forward), ("forward_backward", both)):
        cell[field] = timed(call, args.budget, args.rounds) | {"compile_s": 0.0, "temp_bytes": 0}
    print(json.dumps(cell | {"status": "ok"}))


Prepared = tuple[
    Callable[[], torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
    torch.Tensor,
    Callable[[str, torch.Tensor], torch.Tensor],
]
"""The call, its operands (x, gate), its cotangent, and how to bring a result into our form."""


def accelerated_scan(x: torch.Tensor, log_decay: torch.Tensor, cotangent: torch.Tensor) -> Prepared:
    """Gates are factors, and time is the last axis."""
    from accelerated_scan.scalar import scan

    tokens, gates, grad = (
        a.transpose(1, 2).contiguous() for a in (x, torch.exp(log_decay), cotangent)
    )
    tokens.requires_grad_()
    gates.requires_grad_()

    def order(name: str, found: torch.Tensor) -> torch.Tensor:
        found = found.transpose(1, 2)
        # The gradient of a log is that of the factor times the factor.
        return found.double() * torch.exp(log_decay.double()) if name == "dlog_decay" else found

    return lambda: scan(gates, tokens), (tokens, gates), grad, order


def fla(x: torch.Tensor, log_decay: torch.Tensor, cotangent: torch.Tensor) -> Prepared:
    """The chunked HGRN kernel."""
    from fla.ops.hgrn import chunk_hgrn

    x, log_decay = x.requires_grad_(), log_decay.requires_grad_()
    return lambda: chunk_hgrn(x, log_decay)[0], (x, log_decay), cotangent, lambda _, found: found


def timed(call: Callable[[], Any], budget: float, rounds: int) -> dict[str, float]:
    """Capture a call and time its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    by_replay = sample(graph.replay, 20)
    medians = [
        statistics.median(sample(graph.replay, max(1, round(budget / by_replay))) for _ in range(5))
        for _ in range(rounds)
    ]
    by_call = sample(call, max(1, round(budget / sample(call, 3))))
    middle = statistics.median(medians)
    spread = (max(medians) - min(medians)) / middle
    return {"ms": middle * 1e3, "call_ms": by_call * 1e3, "spread": spread}


def sample(call: Callable[[], Any], count: int) -> float:
    """Return the seconds of a call, over `count` of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
