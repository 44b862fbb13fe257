"""Time of the 2Mamba authors' own kernels, from a checkout of their code; needs PyTorch and Triton.

They take float16, rows of multiples of 128 tokens, and sums of the logarithms of decays.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.peers.timed import Inputs, Prepared, run


def squared(inputs: Inputs, checkout: str) -> Prepared:
    """`2Mamba`: squared products, normalised."""
    return _prepared(inputs, inputs["log_decay"], checkout, "_2Mamba2Furious_square")


def exponential(inputs: Inputs, checkout: str) -> Prepared:
    """`2Mamba-E`: softmax attention with decay."""
    return _prepared(inputs, inputs["log_forget"], checkout, "_2Mamba2Furious_exp")


def _prepared(inputs: Inputs, gates: torch.Tensor, checkout: str, kernel: str) -> Prepared:
    attention = _load(Path(checkout) / "kernel" / f"{kernel}.py").attention
    q, k, v, grad = (
        inputs[name].half().transpose(1, 2).contiguous() for name in ("q", "k", "v", "cotangent")
    )
    passed = torch.cumsum(gates.float(), dim=1).transpose(1, 2).contiguous()
    operands = tuple(a.requires_grad_() for a in (q, k, v, passed))

    def forward() -> torch.Tensor:
        return attention(*operands, True, q.shape[-1] ** -0.5, False)

    def order(name: str, found: torch.Tensor) -> torch.Tensor:
        found = found.transpose(1, 2)
        if name not in ("dlog_decay", "dlog_forget"):
            return found
        # The gradient of a gate is the sum of those of all later cumulative sums.
        return found.double().flip(1).cumsum(1).flip(1)

    return Prepared(forward, operands, grad, order)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} is not there: is this a checkout of the authors' code?")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PEERS = {"2Mamba": squared, "2Mamba-E": exponential}

if __name__ == "__main__":
    run(__doc__, ("q", "k", "v", "log_decay", "log_forget"), PEERS)
