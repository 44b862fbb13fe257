"""Maps of queries and keys, whose products are the similarities of linear attention."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxmem.ops.norms import l2_normalise
from jaxmem.shapes import Queries

Feature = Literal["id", "relu", "silu", "elu1", "l2", "l2_heads"]
POSITIVE: tuple[Feature, ...] = ("relu", "elu1")
"""Maps whose products are never negative."""


def featured(x: Queries, feature: Feature) -> Queries:
    """Map queries or keys, head by head; `l2_heads` takes lengths over the heads instead."""
    if feature == "relu":
        return jax.nn.relu(x)
    if feature == "silu":
        return jax.nn.silu(x)
    if feature == "elu1":
        # Not elu(x) + 1, which is 0 where e^x is below the resolution of 1: from -8 on in bfloat16.
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))
    if feature in ("l2", "l2_heads"):
        return l2_normalise(x, axis=-1 if feature == "l2" else -2)
    return x
