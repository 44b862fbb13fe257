"""The persistent read and its gradients by their formulas, in float64, and by each of its forms."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops import persistent_read_xla as xla
from jaxmem.ops.attention import Dropout
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._dropout import dropout_seed, kept
from pallas_kernels.persistent_read import PersistentReadConfig

PLAIN = ("at once", "blocks", "reference")
"""Forms in plain JAX; `xla` stands for two of them, of few weights and of many."""
TILES = PersistentReadConfig(
    block_rows=16,
    block_pairs=16,
    num_warps=4,
    num_stages=2,
    backward_rows=16,
    backward_pairs=16,
    backward_warps=4,
    backward_stages=2,
)
"""Small enough that few queries and pairs make several tiles."""


class Inputs(NamedTuple):
    q: Any
    keys: Any
    values: Any
    scale: Any


class Size(NamedTuple):
    batch: int = 2
    length: int = 9
    heads: int = 2
    banks: int = 1
    pairs: int = 21
    width: int = 16
    value_width: int = 16


def inputs(size: Size, dtypes: Any = (np.float32,) * 2) -> Inputs:
    """Return operands of order 1; `dtypes` are those of queries and keys, and of values."""
    shapes = (
        (size.batch, size.length, size.heads, size.width),
        (size.banks, size.heads, size.pairs, size.width),
        (size.banks, size.heads, size.pairs, size.value_width),
    )
    arrays = [np.random.default_rng(n).normal(size=s) for n, s in enumerate(shapes)]
    q, keys, values = (
        a.astype(dtype) for a, dtype in zip(arrays, (dtypes[0], *dtypes), strict=True)
    )
    return Inputs(q, keys, values, np.linspace(0.3, 1.5, size.heads).astype(np.float32))


def direct(args: Inputs, factors: np.ndarray | float = 1.0) -> tuple[np.ndarray, Inputs]:
    """Return the read and the gradients of Σ cos(n) y_n."""
    q, keys, values, scale = (np.asarray(a, np.float64) for a in args)
    dots = np.einsum("bthk,rhpk->rbthp", q, keys)
    logits = dots * scale[:, None]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("rbthp,rhpv->bthv", weights * factors, values) / len(keys)
    grad = np.cos(np.arange(y.size)).reshape(y.shape) / len(keys)
    weight_grad = np.einsum("bthv,rhpv->rbthp", grad, values) * factors
    inner = np.sum(weights * weight_grad, axis=-1, keepdims=True)
    logit_grad = weights * (weight_grad - inner)
    return y, Inputs(
        np.einsum("rbthp,rhpk,h->bthk", logit_grad, keys, scale),
        np.einsum("rbthp,bthk,h->rhpk", logit_grad, q, scale),
        np.einsum("rbthp,bthv->rhpv", weights * factors, grad),
        np.einsum("rbthp,rbthp->h", logit_grad, dots),
    )


def factors(size: Size, dropout: Dropout) -> np.ndarray:
    """Return the dropout factors of all weights, in the order of `direct`."""
    rows = np.arange(size.banks * size.heads * size.batch * size.length, dtype=np.int32)
    found = _factors(
        dropout.key, rows[:, None], np.arange(size.pairs, dtype=np.int32), dropout.rate
    )
    by_table = np.reshape(found, (size.banks, size.heads, size.batch, size.length, -1))
    return np.moveaxis(by_table, 1, 3)


@functools.partial(jax.jit, static_argnums=3)
def _factors(key: jax.Array, rows: jax.Array, pairs: jax.Array, rate: float) -> jax.Array:
    return kept(*dropout_seed(key), rows, pairs, rate)


def value_and_grads(read: Callable[[Inputs], jax.Array]) -> Callable[[Inputs], Any]:
    """Return what `direct` returns as a function of the arguments."""

    def both(args: Inputs) -> tuple[jax.Array, Inputs]:
        def scalar(args: Inputs) -> tuple[jax.Array, jax.Array]:
            y = read(args)
            wide = at_least_float32(y).ravel()
            return jnp.sum(wide * jnp.cos(jnp.arange(y.size, dtype=wide.dtype))), y

        (_, y), grads = jax.value_and_grad(scalar, has_aux=True)(args)
        return y, grads

    return both


@functools.cache
def _program(form: str, rate: float | None, config: PersistentReadConfig | None) -> Callable:
    """Return one jitted function for all calls that agree in what is static."""
    implementation = form if form in ("reference", "pallas") else "xla"

    @jax.jit
    def both(args: Inputs, key: Any) -> tuple[jax.Array, Inputs]:
        options: Any = {"implementation": implementation, "config": config}
        options["dropout"] = None if rate is None else Dropout(rate, key)

        def read(args: Inputs) -> jax.Array:
            return persistent_read(*args[:3], scale=args.scale, **options)

        with pytest.MonkeyPatch.context() as patch:
            if form == "blocks":  # of 128 queries
                patch.setattr(xla, "WEIGHTS_LIMIT", 0)
            return value_and_grads(read)(args)

    return both


def run(
    args: Inputs,
    form: str,
    dropout: Dropout | None = None,
    config: PersistentReadConfig | None = TILES,
) -> tuple[np.ndarray, Inputs]:
    """Return what a form of the op finds as `direct` does, in NumPy.

    Calls of the same shapes and options run the same program.
    """
    rate, key = (None, None) if dropout is None else dropout
    return jax.tree.map(np.asarray, _program(form, rate, config)(args, key))


def check_scales(size: Size, form: str) -> None:
    """Check that errors are no more than a scale costs, with keys and queries of length 1.

    As the test of attention by this name.
    """
    args = inputs(size)
    q, keys = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (args.q, args.keys))
    largest = np.max(np.abs(args.values))
    for scale in np.exp([0.0, 4.0, 8.0, 12.0, 16.0, 18.0, 20.0, 22.0]).astype(np.float32):
        args = Inputs(q, keys, args.values, np.array([scale, -scale]))
        y, grads = run(args, form)
        assert all(np.all(np.isfinite(a)) for a in (y, *grads)), scale
        wanted, wanted_grads = direct(args)
        cost = min(4 * scale * 2.0**-24, 2.0) + 4e-7
        assert np.max(np.abs(y - wanted)) <= cost * largest, scale
        for name, unit_of in (("values", 1.0), ("q", scale), ("keys", scale), ("scale", 80.0)):
            error = getattr(grads, name) - getattr(wanted_grads, name)
            # A gradient adds up such errors, which have all signs.
            assert np.max(np.abs(error)) <= cost * unit_of * 16 * largest, (scale, name)
