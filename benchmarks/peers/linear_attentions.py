"""Time of other packages' linear attention on the inputs of `experiments.benchmark`.

Needs PyTorch and the package: fla-core (0.6.0) or mlstm_kernels (2.0.6).
"""

from collections.abc import Callable

import torch

from benchmarks.peers.timed import Inputs, Prepared, run


def fla_linear(inputs: Inputs) -> Prepared:
    """Without decay."""
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = _leaves(inputs)
    return _as_given(lambda: chunk_linear_attn(q, k, v, normalize=False)[0], (q, k, v), inputs)


def fla_simple_gla(inputs: Inputs) -> Prepared:
    """With a decay per token; queries and keys of a group are copied for its heads beforehand."""
    from fla.ops.simple_gla import chunk_simple_gla

    groups = inputs["q"].shape[2]
    q, k, v = _leaves(inputs)
    gates = inputs["log_decay"].requires_grad_()

    def order(name: str, found: torch.Tensor) -> torch.Tensor:
        if name not in ("dq", "dk"):
            return found
        # The gradient of what heads share is the sum of theirs.
        return found.float().unflatten(2, (groups, -1)).sum(3)

    def forward() -> torch.Tensor:
        return chunk_simple_gla(q, k, v, gates)[0]

    return Prepared(forward, (q, k, v, gates), inputs["cotangent"], order)


def fla_retention(inputs: Inputs) -> Prepared:
    """With RetNet's decays per head, which the package computes itself and takes no gradient of."""
    from fla.ops.retention import chunk_retention

    q, k, v = _leaves(inputs)
    return _as_given(lambda: chunk_retention(q, k, v)[0], (q, k, v), inputs)


def mlstm_kernels(inputs: Inputs) -> Prepared:
    """The mLSTM without normaliser, whose input gate is open and whose forget gate is our decay.

    Heads come before time, and gates are the arguments of sigmoids.
    """
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import (
        mlstm_siging_chunkwise__xl_chunk,
    )

    log_decay = inputs["log_decay"].float()
    kept = torch.expm1(-log_decay).clamp_min(1e-30)  # 1 / e^g - 1
    q, k, v, forget, grad = (
        a.transpose(1, 2).contiguous()
        for a in (*_leaves(inputs), -torch.log(kept), inputs["cotangent"])
    )
    operands = tuple(a.detach().requires_grad_() for a in (q, k, v, forget))
    q, k, v, forget = operands
    open_gate = torch.full_like(forget, 30.0).detach()  # sigmoid is 1 in float32

    def forward() -> torch.Tensor:
        return mlstm_siging_chunkwise__xl_chunk(
            q,
            k,
            v,
            open_gate,
            forget,
            normalize=False,
            autocast_kernel_dtype=v.dtype,
        )

    def order(name: str, found: torch.Tensor) -> torch.Tensor:
        found = found.transpose(1, 2)
        # g = log sigmoid(f), so df = dg (1 - e^g).
        return found.double() / -torch.expm1(log_decay.double()) if name == "dlog_decay" else found

    return Prepared(forward, operands, grad.to(v.dtype), order)


def _leaves(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v of as many heads each."""
    share = inputs["v"].shape[2] // inputs["q"].shape[2]
    q, k = (inputs[name].repeat_interleave(share, dim=2).requires_grad_() for name in ("q", "k"))
    return q, k, inputs["v"].requires_grad_()


def _as_given(
    forward: Callable[[], torch.Tensor], operands: tuple[torch.Tensor, ...], inputs: Inputs
) -> Prepared:
    return Prepared(forward, operands, inputs["cotangent"], lambda _, found: found)


PEERS = {
    "fla chunk_linear_attn": fla_linear,
    "fla chunk_simple_gla": fla_simple_gla,
    "fla chunk_retention": fla_retention,
    "mlstm_kernels": mlstm_kernels,
}

if __name__ == "__main__":
    run(__doc__, ("q", "k", "v", "log_decay"), PEERS)
