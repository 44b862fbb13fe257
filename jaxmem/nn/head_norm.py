"""Norms of what heads read: of each head's output, or of all of them together."""

from typing import Literal

from jax import Array

from jaxmem.nn.layers import LayerNorm, Norm, RMSNorm
from jaxmem.nn.scaled import Scaled, l2_normed, layer_normed, rms_normed, value

OutNorm = Literal["none", "ln", "rms", "l2", "l2d", "rms_all"]
PER_HEAD: tuple[OutNorm, ...] = ("ln", "rms", "l2", "l2d")


def build_out_norm(kind: OutNorm, dim: int, heads: int, eps: float) -> Norm | None:
    """Build what a norm has of parameters; None if it has none."""
    if kind == "ln":
        return LayerNorm(dim // heads, use_bias=True, eps=eps)
    if kind in ("rms", "rms_all"):
        return RMSNorm(dim if kind == "rms_all" else dim // heads, eps=eps)
    return None


def head_normed(of: Scaled, kind: OutNorm, norm: Norm | None) -> Array:
    """Return each head's vector, normalised if the norm is one of each head.

    l2d is unit length times the width.
    """
    if kind in ("l2", "l2d"):
        return l2_normed(of) * (of.x.shape[-1] if kind == "l2d" else 1)
    if kind in ("none", "rms_all") or norm is None:
        return value(of)
    if isinstance(norm, LayerNorm):
        bias = None if norm.bias is None else norm.bias[...]
        return layer_normed(of, norm.weight[...], bias, norm.eps)
    return rms_normed(of, norm.weight[...], norm.eps)
