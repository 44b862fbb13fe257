"""Time of other packages' gated scans on the inputs of `experiments.benchmark`; needs PyTorch."""

import torch

from benchmarks.peers.timed import Inputs, Prepared, run


def accelerated_scan(inputs: Inputs) -> Prepared:
    """Gates are factors, and time is the last axis."""
    from accelerated_scan.scalar import scan

    log_decay = inputs["log_decay"]
    tokens, gates, grad = (
        a.transpose(1, 2).contiguous()
        for a in (inputs["x"], torch.exp(log_decay), inputs["cotangent"])
    )
    tokens.requires_grad_()
    gates.requires_grad_()

    def order(name: str, found: torch.Tensor) -> torch.Tensor:
        found = found.transpose(1, 2)
        # The gradient of a log is that of the factor times the factor.
        return found.double() * torch.exp(log_decay.double()) if name == "dlog_decay" else found

    return Prepared(lambda: scan(gates, tokens), (tokens, gates), grad, order)


def fla(inputs: Inputs) -> Prepared:
    """The chunked HGRN kernel."""
    from fla.ops.hgrn import chunk_hgrn

    x, log_decay = inputs["x"].requires_grad_(), inputs["log_decay"].requires_grad_()
    return Prepared(
        lambda: chunk_hgrn(x, log_decay)[0],
        (x, log_decay),
        inputs["cotangent"],
        lambda _, found: found,
    )


if __name__ == "__main__":
    run(__doc__, ("x", "log_decay"), {"accelerated_scan": accelerated_scan, "fla": fla})
