"""Initialisation rules of whole models: what a weight, a residual output and a table start from."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float, PRNGKeyArray

from jaxmem.shapes import Key

InitRule = Literal["gpt2", "fan_in", "depth_scaled", "uniform"]


class Init(NamedTuple):
    """The initialisers that a backbone hands to its parts."""

    weight: Initializer
    """Projections, (inputs, outputs)."""
    residual: Initializer
    """Projections whose output is added to the residual stream."""
    embedding: Initializer
    """Tables of vectors, (number, width)."""
    head: Initializer
    """The output table, (vocabulary, width), also where it is the embedding too."""


def gpt2_init(depth: int, std: float = 0.02) -> Init:
    """Return GPT-2's rule: N(0, std), and N(0, std/sqrt(2 depth)) for residual outputs.

    Reference: nanoGPT and nanoMosaics `_init_weights`.
    """
    normal = nnx.initializers.normal
    return Init(normal(std), normal(std / math.sqrt(2 * depth)), normal(std), normal(std))


def fan_in_init(depth: int) -> Init:
    """Return N(0, 1/sqrt(inputs)), over sqrt(depth) for residual outputs; embeddings are N(0, 1).

    Reference: Memory Mosaics (arXiv 2405.06394), Library `StackAssoMem`: a shared table starts as
      the output head.
    """
    scaled = nnx.initializers.variance_scaling
    return Init(
        scaled(1.0, "fan_in", "normal"),
        scaled(1.0 / depth, "fan_in", "normal"),
        nnx.initializers.normal(1.0),
        scaled(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2),
    )


def depth_scaled_init(block: int) -> Init:
    """Return N(0, σ²) cut at 3σ, σ = 1/sqrt(2 inputs (block + 1)); 1/sqrt(2 width) for tables.

    Args:
      block: which block of the model, from 0.

    Reference: Memory Mosaics v2 (arXiv 2507.03285), appendix.
    """
    projection = _cut_normal(lambda shape: 1.0 / math.sqrt(2 * shape[0] * (block + 1)))
    table = _cut_normal(lambda shape: 1.0 / math.sqrt(2 * shape[1]))
    return Init(projection, projection, table, table)


def uniform_init() -> Init:
    """Return U(±1/sqrt(inputs)) for all projections, residual outputs too; tables are N(0, 0.02).

    Reference: the default of PyTorch's linear layers, from which the layers of 2Mamba start (arXiv
      2602.17363), with Llama's embedding and output tables.
    """
    table = nnx.initializers.normal(0.02)
    return Init(uniform_fan_in(), uniform_fan_in(), table, table)


def uniform_fan_in() -> Initializer:
    """Return U(±1/sqrt(inputs)) for shapes (inputs, outputs)."""
    return nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def uniform(limit: float) -> Initializer:
    """Return U(-limit, limit), such as for biases, whose shape does not tell the inputs."""

    def draw(key: Key, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Array:
        dtype = jnp.float32 if dtype is None else dtype
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _cut_normal(std: Callable[[Sequence[int]], float]) -> Initializer:
    """Return N(0, std(shape)²) cut at three deviations."""

    def draw(key: Key, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Array:
        rule = nnx.initializers.truncated_normal(std(shape), lower=-3.0, upper=3.0)
        return rule(key, shape, dtype)

    return draw


INIT_RULES: dict[InitRule, Callable[[int, int], Init]] = {
    "gpt2": lambda depth, block: gpt2_init(depth),
    "fan_in": lambda depth, block: fan_in_init(depth),
    "depth_scaled": lambda depth, block: depth_scaled_init(block),
    "uniform": lambda depth, block: uniform_init(),
}
"""From a name to the rule as a function of the model's depth and of the block, counted from 0."""


def uniform_per_head(key: PRNGKeyArray, heads: int) -> Float[Array, "H"]:
    """Draw one number per head from U(0, 1)."""
    return jax.random.uniform(key, (heads,))


def decay_ladder(heads: int) -> Float[Array, "H"]:
    """Return the stored decay parameters: rates |10 beta| from 0.5 to 5 over the heads.

    Reference: Memory Mosaics `LeakyAvg`: linspace(0.5, 5, H) / 10.
    """
    return jnp.linspace(0.5, 5.0, heads) / 10.0
