"""Log decays per token and head, and values times steps, as gated linear layers compute them."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxmem.nn.init import Init, uniform
from jaxmem.nn.layers import Linear
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import Activations, Key, Values

DecayKind = Literal[
    "discretize", "neg_softplus", "neg_softplus_dt", "neg_softplus2", "neg_silu", "lagged"
]
GROWING: tuple[DecayKind, ...] = ("neg_softplus2", "neg_silu", "lagged")
"""Kinds whose weights may grow on their way."""
LAGGED_DIVISOR = 1024.0
"""What the sum of `lagged` gates is divided by."""
A_RANGE = (1.0, 16.0)
"""Rates that `discretize` starts from, as in Mamba-2."""
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4
"""Steps that a bias of dt starts from, as in Mamba-2."""

ValueForm = Literal["none", "dt", "sigmoid", "silu", "softplus", "softplus2"]
PerHead = Float[Array, "B T H"]


class Decay(nnx.Module):
    """A_t, the log decay of a token and head, from x and the step dt.

    discretize: -e^a dt; neg_softplus: -softplus(W x); neg_softplus_dt: -softplus(W x) dt;
    neg_softplus2: -u softplus(u), u = W x; neg_silu: -u σ(u); lagged: (W x + b) / 1024

    The last three may be positive, and weights then grow from token to token without bound, as
    upstream. Layers bring them back where only their ratios count (`jaxmem.ops.decay`); elsewhere
    they leave the range of floats in rows that are long enough. `lagged` counts from the token
    after (`gated_softmax_decay`), a shift that is the mixer's, for it needs the token before.

    Reference: 2Mamba2Furious (arXiv 2602.17363), `A_mask_type`; Mamba-2 (arXiv 2405.21060).
    """

    def __init__(self, dim: int, heads: int, kind: DecayKind, *, init: Init, rngs: nnx.Rngs):
        self.kind: DecayKind = kind
        steps = kind == "discretize"
        self.log_rate = nnx.Param(log_rates(rngs.params(), heads)) if steps else None
        bias = kind == "lagged"
        plain: dict[str, Any] = {"use_bias": bias, "init": init.weight, "rngs": rngs}
        plain["bias_init"] = uniform(1.0 / math.sqrt(dim)) if bias else None
        self.projection = None if steps else Linear(dim, heads, **plain)

    def __call__(self, x: Activations, dt: PerHead | None) -> PerHead:
        """Return log decays in float32 or wider; `dt` is None where the layer has none."""
        step = 1.0 if dt is None else dt
        if self.log_rate is not None:
            return -jnp.exp(self.log_rate[...]) * step
        assert self.projection is not None
        u = at_least_float32(self.projection(x))
        if self.kind == "lagged":
            return u / LAGGED_DIVISOR
        if self.kind == "neg_silu":
            return -jax.nn.silu(u)
        rate = jax.nn.softplus(u)
        if self.kind == "neg_softplus_dt":
            rate = rate * step
        return -u * rate if self.kind == "neg_softplus2" else -rate


def discretised(v: Values, form: ValueForm, dt: PerHead | None) -> Values:
    """Return v dt, where dt may be a sigmoid's; or silu(v), softplus(v), v softplus(v)."""
    if form == "silu":
        return jax.nn.silu(v)
    if form in ("softplus", "softplus2"):
        return jax.nn.softplus(v) * (v if form == "softplus2" else 1)
    if form == "none" or dt is None:
        return v
    return v * dt[..., None].astype(v.dtype)


def log_rates(key: Key, heads: int) -> Float[Array, "H"]:
    """Draw log a with a from U(1, 16), the rates per unit of dt."""
    return jnp.log(jax.random.uniform(key, (heads,), minval=A_RANGE[0], maxval=A_RANGE[1]))


def step_biases(key: Key, heads: int) -> Float[Array, "H"]:
    """Draw b with softplus(b) = dt log-uniform in [0.001, 0.1]."""
    low, high = map(jnp.log, jnp.asarray(DT_RANGE))
    dt = jnp.exp(jax.random.uniform(key, (heads,), minval=low, maxval=high))
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))
