"""Models whose parameters NumPy draws, so that nothing is compiled to build them."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def drawn(make: Callable[[], M], *, seed: int = 0, spread: float = 0.5) -> M:
    """Build a model with normal parameters: strong blocks, norms near 1, small embeddings.

    At initialisation a model with a tied head merely repeats its input.

    Args:
      make: builds the model; it is traced only.
      seed: of the parameters.
      spread: standard deviation of all parameters but embeddings.
    """

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        # Models that share a parameter share its numbers, whatever else they have.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        middle, width = 1.0 * ("norm" in name), 0.02 if "embedding" in name else spread
        return jax.device_put(np.asarray(middle + width * rng.normal(size=leaf.shape), leaf.dtype))

    graphdef, params = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map_with_path(draw, params))
