"""What the scripts of peers share: their options, the gate before the clock, and the clock.

Each call runs as a captured CUDA graph, so its time is device time. Inputs are laid out as the
package wants them before anything is timed. The result is checked before it is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch


class Prepared(NamedTuple):
    """A peer's call on its own layout."""

    forward: Callable[[], torch.Tensor]
    operands: tuple[torch.Tensor, ...]
    """What gradients are taken of, in the order of our operands."""
    cotangent: torch.Tensor
    order: Callable[[str, torch.Tensor], torch.Tensor]
    """From the name of a result and the result to our layout of it."""


Inputs = dict[str, torch.Tensor]
"""Our operands by name, and the cotangent of the result."""


def run(
    description: str | None, names: tuple[str, ...], peers: Mapping[str, Callable[..., Prepared]]
) -> None:
    """Check a peer, time it, and print a line of JSON.

    Args:
      description: of the script.
      names: of our operands, in their order.
      peers: from the name of a peer to what prepares it, (inputs) or, if a checkout is given,
        (inputs, checkout).
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--peer", choices=tuple(peers), required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--tolerance", type=float, required=True)
    parser.add_argument("--checkout")
    args = parser.parse_args()
    data = np.load(args.inputs)
    inputs = load(data, (*names, "cotangent"), args.dtype)
    names = tuple(name for name in names if name in inputs)
    extra = () if args.checkout is None else (args.checkout,)
    prepared = peers[args.peer](inputs, *extra)

    def both() -> tuple[torch.Tensor, ...]:
        y = prepared.forward()
        return y, *torch.autograd.grad(y, prepared.operands, prepared.cotangent)

    cell: dict[str, Any] = {"errors": errors(data, names, both(), prepared.order)}
    worst = max(cell["errors"].values())
    if not worst <= args.tolerance:
        reason = f"not timed: error {worst:.1e} exceeds {args.tolerance:.0e}"
        print(json.dumps(cell | {"status": "incorrect", "reason": reason}))
        return
    for field, call in (("forward", prepared.forward), ("forward_backward", both)):
        cell[field] = timed(call, args.budget, args.rounds) | {"compile_s": 0.0, "temp_bytes": 0}
    print(json.dumps(cell | {"status": "ok"}))


def load(data: Mapping[str, np.ndarray], names: tuple[str, ...], dtype: str) -> Inputs:
    """Return the inputs that there are, on the GPU; those that we keep in float32 stay so."""
    kept = {str(name) for name in data["float32"]}
    return {
        name: torch.tensor(
            data[name], device="cuda", dtype=getattr(torch, "float32" if name in kept else dtype)
        )
        for name in names
        if name in data
    }


def errors(
    data: Mapping[str, np.ndarray],
    names: tuple[str, ...],
    found: tuple[torch.Tensor, ...],
    order: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Return the relative error of the result and of the gradients that a peer has."""
    results = {}
    for number, name in enumerate(("out", *(f"d{name}" for name in names))):
        if number == len(found):  # operands that a peer takes as constants come last
            break
        exact = data[f"expected_{number}"]
        difference = order(name, found[number].detach()).detach().double().cpu().numpy() - exact
        results[name] = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    return results


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
