"""Initialisation rules of whole models: what a weight, a residual output and a table start from."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float, PRNGKeyArray


class Init(NamedTuple):
    """The initialisers that a backbone hands to its parts."""

    weight: Initializer
    """Projections."""
    residual: Initializer
    """Projections whose output is added to the residual stream."""
    embedding: Initializer


def gpt2_init(depth: int, std: float = 0.02) -> Init:
    """Return GPT-2's rule: N(0, std), and N(0, std/sqrt(2 depth)) for residual outputs.

    Reference: nanoGPT and nanoMosaics `_init_weights`.
    """
    normal = nnx.initializers.normal
    return Init(normal(std), normal(std / math.sqrt(2 * depth)), normal(std))


def uniform_per_head(key: PRNGKeyArray, heads: int) -> Float[Array, "H"]:
    """Draw one number per head from U(0, 1)."""
    return jax.random.uniform(key, (heads,))


def decay_ladder(heads: int) -> Float[Array, "H"]:
    """Return the stored decay parameters: rates |10 beta| from 0.5 to 5 over the heads.

    Reference: Memory Mosaics `LeakyAvg`: linspace(0.5, 5, H) / 10.
    """
    return jnp.linspace(0.5, 5.0, heads) / 10.0
