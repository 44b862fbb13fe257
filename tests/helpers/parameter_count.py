"""How many parameters a model has, without building all of its blocks."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx


def parameter_count(model: Any) -> int:
    """Count from shapes; the blocks of a decoder are alike, so the second tells what more have."""
    depth = getattr(model, "depth", 0)
    built = dataclasses.replace(model, depth=2) if depth > 2 else model
    state = nnx.state(nnx.eval_shape(lambda: built.build(nnx.Rngs(0))))
    total = _count(state)
    return total + (depth - 2) * _count(state["blocks"][1]) if depth > 2 else total


def _count(state: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
