"""Attention and its gradients by their formulas, in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.ops.attention import Dropout, attention_with_lse
from pallas_kernels._dropout import dropout_seed, kept
from tests.helpers.compare import FORWARD, GRADIENT, Budget, assert_close


class Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any
    scale: Any
    log_forget: Any = None
    value_gate: Any = None


class Size(NamedTuple):
    batch: int = 2
    length: int = 17
    heads: int = 2
    groups: int = 2
    width: int = 16
    value_width: int = 16
    keys: int = 0
    """As many as queries if 0."""


class Outputs(NamedTuple):
    y: Any
    lse: Any


def inputs(
    size: Size,
    *,
    gated: bool = False,
    value_gated: bool = False,
    dtypes: Any = (jnp.float32,) * 2,
) -> Inputs:
    keys = size.keys or size.length
    shapes = (
        (size.batch, size.length, size.heads, size.width),
        (size.batch, keys, size.groups, size.width),
        (size.batch, keys, size.groups, size.value_width),
        (size.batch, keys, size.heads),
        (size.batch, keys, size.heads),
    )
    draw = [jax.random.normal(jax.random.key(n), s) for n, s in enumerate(shapes)]
    return Inputs(
        draw[0].astype(dtypes[0]),
        draw[1].astype(dtypes[0]),
        draw[2].astype(dtypes[1]),
        jnp.linspace(0.3, 1.2, size.heads),
        -jax.nn.softplus(draw[3]) if gated else None,
        draw[4] if value_gated else None,
    )


def with_whole_dots(args: Inputs, scale: float) -> Inputs:
    """Return whole queries and keys, so that in every form logits are exact multiples of `scale`.

    No q·k is large: `scale` times a few is what logits reach.
    """
    q, k = (jnp.round(1.5 * a) for a in (args.q, args.k))
    return args._replace(q=q, k=k, scale=jnp.full_like(args.scale, scale))


def rows_visible(
    size: Size, *, lag: int = 0, window: int | None = None, segments: Any = None
) -> np.ndarray:
    """Return which queries of rows see which keys, by loops."""
    seen = np.zeros((size.batch, size.length, size.length), bool)
    for row, i, j in np.ndindex(seen.shape):
        behind = i - j
        near = lag <= behind and (window is None or behind < window)
        names = (1, 1) if segments is None else (segments[row][i], segments[row][j])
        seen[row, i, j] = near and names[0] == names[1] != 0
    return seen


def factors(size: Size, dropout: Dropout | None) -> np.ndarray | float:
    """Return the dropout factors of all weights [B H T S]."""
    if dropout is None:
        return 1.0
    low, high = dropout_seed(dropout.key)
    shape = (size.batch, size.heads, size.length, 1)
    rows = jnp.arange(np.prod(shape)).reshape(shape)
    return np.asarray(kept(low, high, rows, jnp.arange(size.keys or size.length), dropout.rate))


def direct(
    args: Inputs,
    visible: np.ndarray,
    factor: np.ndarray | float = 1.0,
    clamp: float = np.inf,
    of_lse: bool = True,
) -> tuple[Outputs, Inputs]:
    """Return outputs, and gradients of Σ cos(n) y_n + Σ sin(n) lse_n over finite ones.

    Without `of_lse` the second sum is left out.
    """
    q, k, v, scale, gates, value_gate = (
        None if a is None else np.asarray(a, np.float64) for a in args
    )
    groups, heads = k.shape[2], q.shape[2]
    k, v = (np.repeat(a, heads // groups, axis=2) for a in (k, v))
    dots = np.einsum("bthk,bshk->bhts", q, k)
    scaled = dots * scale[:, None, None]
    logits = np.minimum(scaled, clamp)
    if gates is not None:
        sums = np.moveaxis(np.cumsum(gates, axis=1), 1, 2)
        logits = logits + sums[..., None] - sums[..., None, :]
    seen = visible[:, None]
    logits = np.where(seen, logits, -np.inf)
    empty = ~np.broadcast_to(seen.any(-1), logits.shape[:3])
    top = np.where(empty, 0.0, logits.max(-1))[..., None]
    exponentials = np.exp(logits - top)
    total = np.where(empty, 1.0, exponentials.sum(-1))[..., None]
    weights = exponentials / total
    opened = 1.0 if value_gate is None else np.moveaxis(value_gate, 1, 2)[:, :, None]
    y = np.einsum("bhts,bshv->bthv", weights * factor * opened, v)
    lse = np.moveaxis(np.where(empty, -np.inf, (top + np.log(total))[..., 0]), 1, 2)
    grad = np.cos(np.arange(y.size)).reshape(y.shape)
    lse_grad = np.where(np.isfinite(lse), np.sin(np.arange(lse.size)).reshape(lse.shape), 0.0)
    lse_grad = lse_grad * of_lse
    read_grad = np.einsum("bthv,bshv->bhts", grad, v) * factor
    weight_grad = read_grad * opened
    inner = np.sum(weights * weight_grad, -1) - np.moveaxis(lse_grad, 1, 2)
    logit_grad = weights * (weight_grad - inner[..., None])

    def grouped(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:2], groups, -1, a.shape[-1]).sum(3)

    forget = None
    if gates is not None:
        of_sums = np.moveaxis(logit_grad.sum(3) - logit_grad.sum(2), 1, 2)
        forget = np.flip(np.cumsum(np.flip(of_sums, 1), axis=1), 1)
    of_gate = None
    if value_gate is not None:
        of_gate = np.moveaxis(np.sum(weights * read_grad, axis=2), 1, 2)
    free = np.where(scaled <= clamp, logit_grad, 0.0)
    return Outputs(y, lse), Inputs(
        np.einsum("bhts,bshk,h->bthk", free, k, scale),
        grouped(np.einsum("bhts,bthk,h->bshk", free, q, scale)),
        grouped(np.einsum("bhts,bthv->bshv", weights * factor * opened, grad)),
        np.einsum("bhts,bhts->h", free, dots),
        forget,
        of_gate,
    )


def run(args: Inputs, **options: Any) -> tuple[Outputs, Inputs]:
    """Return the outputs and gradients of the op, as `direct` does."""

    def both(args: Inputs) -> Any:
        def scalar(args: Inputs) -> tuple[jax.Array, Outputs]:
            y, lse = attention_with_lse(**args._asdict(), **options)
            wide = y.astype(lse.dtype).ravel()
            total = jnp.sum(wide * jnp.cos(jnp.arange(y.size)))
            finite = jnp.where(lse == -jnp.inf, 0.0, lse).ravel()
            return total + jnp.sum(finite * jnp.sin(jnp.arange(lse.size))), Outputs(y, lse)

        return jax.value_and_grad(scalar, has_aux=True)(args)

    (_, outputs), grads = jax.jit(both)(args)
    return outputs, grads


def check(
    found: tuple[Outputs, Inputs],
    expected: tuple[Outputs, Inputs],
    forward: Budget = FORWARD,
    gradient: Budget = GRADIENT,
) -> None:
    """Compare outputs and gradients; queries that see nothing must give 0 and -inf."""
    (outputs, grads), (wanted, wanted_grads) = found, expected
    lse = np.asarray(outputs.lse)
    empty = wanted.lse == -np.inf
    np.testing.assert_array_equal(lse == -np.inf, empty)
    np.testing.assert_array_equal(np.asarray(outputs.y, np.float32)[empty], 0.0)
    np.testing.assert_array_equal(np.asarray(grads.q, np.float32)[empty], 0.0)
    assert_close(outputs.y, wanted.y, forward)
    assert_close(np.where(empty, 0.0, lse), np.where(empty, 0.0, wanted.lse), forward)
    assert_close(grads, wanted_grads, gradient)
