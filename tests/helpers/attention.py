"""Attention and its gradients by their formulas, in float64, and by each of its forms."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops import attention_blocked, attention_xla
from jaxmem.ops.attention import Dropout, attention_with_lse
from pallas_kernels._dropout import dropout_seed, kept
from pallas_kernels.pairs import PairTiles, Places
from tests.helpers.compare import FORWARD, GRADIENT, Budget, assert_close

PLAIN = ("at once", "blocked", "reference")
"""Forms in plain JAX; `xla` stands for two of them, of short and of long rows."""
FORMS = (*PLAIN, "pallas")
TILES = PairTiles(
    block_q=16,
    block_k=16,
    num_warps=4,
    num_stages=2,
    backward_q=16,
    backward_k=16,
    backward_warps=4,
    backward_stages=2,
)
"""Small enough that few tokens make several tiles."""


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
    dtypes: Any = (np.float32,) * 2,
) -> Inputs:
    """Return operands of order 1; `dtypes` are those of queries and keys, and of values."""
    keys = size.keys or size.length
    shapes = (
        (size.batch, size.length, size.heads, size.width),
        (size.batch, keys, size.groups, size.width),
        (size.batch, keys, size.groups, size.value_width),
        (size.batch, keys, size.heads),
        (size.batch, keys, size.heads),
    )
    q, k, v, forget, gate = (
        np.random.default_rng(n).normal(size=shape).astype(np.float32)
        for n, shape in enumerate(shapes)
    )
    return Inputs(
        q.astype(dtypes[0]),
        k.astype(dtypes[0]),
        v.astype(dtypes[1]),
        np.linspace(0.3, 1.2, size.heads, dtype=np.float32),
        -np.logaddexp(0, forget) if gated else None,
        gate if value_gated else None,
    )


def with_whole_dots(args: Inputs, scale: float) -> Inputs:
    """Return whole queries and keys, so that in every form logits are exact multiples of `scale`.

    No q·k is large: `scale` times a few is what logits reach.
    """
    q, k = (np.round(1.5 * a) for a in (args.q, args.k))
    return args._replace(q=q, k=k, scale=np.full_like(args.scale, scale))


def rows_visible(
    size: Size, *, lag: int = 0, window: int | None = None, segments: Any = None
) -> np.ndarray:
    """Return which queries of rows see which keys."""
    index = np.arange(size.length)
    behind = index[:, None] - index
    near = (lag <= behind) & (behind < (np.inf if window is None else window))
    names = np.asarray(segments or np.ones((size.batch, size.length)))
    same = names[:, :, None] == names[:, None, :]
    return near & same & (names != 0)[:, None, :]


def factors(size: Size, dropout: Dropout) -> np.ndarray:
    """Return the dropout factors of all weights [B H T S]."""
    shape = (size.batch, size.heads, size.length, 1)
    rows = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    keys = np.arange(size.keys or size.length, dtype=np.int32)
    return np.asarray(_factors(dropout.key, rows, keys, dropout.rate))


@functools.partial(jax.jit, static_argnums=3)
def _factors(key: jax.Array, rows: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    return kept(*dropout_seed(key), rows, keys, rate)


def direct(
    args: Inputs,
    visible: np.ndarray,
    factor: np.ndarray | float = 1.0,
    clamp: float = np.inf,
    of_lse: bool = True,
    slots: np.ndarray | None = None,
) -> tuple[Outputs, Inputs]:
    """Return outputs, and gradients of Σ cos(n) y_n + Σ sin(n) lse_n over finite ones.

    Without `of_lse` the second sum is left out. `slots` [B T] are the places of queries among the
    gates; without them there is a query per gate.
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
        row = np.arange(len(q))[:, None]
        slots = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2]) if slots is None else slots
        sums = np.cumsum(gates, axis=1)
        at_queries, at_keys = (np.moveaxis(a, 1, 2) for a in (sums[row, slots], sums))
        logits = logits + at_queries[..., None] - at_keys[..., None, :]
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
        of_sums = -np.moveaxis(logit_grad.sum(2), 1, 2)
        np.add.at(of_sums, (row, slots), np.moveaxis(logit_grad.sum(3), 1, 2))
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


@contextlib.contextmanager
def forced(form: str) -> Iterator[dict[str, Any]]:
    """Yield what to ask for a form by, which what is traced meanwhile takes."""
    if form == "pallas":
        yield {"implementation": "pallas", "config": TILES}
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_xla, "fits_at_once", lambda q, k: form == "at once")
        patch.setattr(attention_blocked, "block_of", lambda n: min(n, 4 if n < 32 else 16))
        yield {"implementation": "reference" if form == "reference" else "xla"}


def value_and_grads(read: Callable[..., Outputs]) -> Callable[..., tuple[Outputs, Inputs]]:
    """Return what `direct` returns as a function of (arguments, weight of the log-sum-exp, ...).

    `read` is a function of (arguments, ...).
    """

    def both(args: Inputs, of_lse: Any, *data: Any) -> tuple[Outputs, Inputs]:
        def scalar(args: Inputs) -> tuple[jax.Array, Outputs]:
            y, lse = read(args, *data)
            wide = y.astype(lse.dtype).ravel()
            total = jnp.sum(wide * jnp.cos(jnp.arange(y.size)))
            finite = jnp.where(lse == -jnp.inf, 0.0, lse).ravel()
            of_lses = jnp.sum(finite * jnp.sin(jnp.arange(lse.size)))
            return total + of_lse * of_lses, Outputs(y, lse)

        (_, outputs), grads = jax.value_and_grad(scalar, has_aux=True)(args)
        return outputs, grads

    return both


@functools.cache
def _program(form: str, rate: float | None, options: tuple[tuple[str, Any], ...]) -> Callable:
    """Return one jitted function for all calls that agree in what is static."""

    def both(args: Inputs, of_lse: Any, key: Any, data: dict[str, Any]) -> tuple[Outputs, Inputs]:
        dropout = None if rate is None else Dropout(rate, key)
        with forced(form) as named:
            given = {**named, **dict(options), "dropout": dropout}
            return value_and_grads(functools.partial(read, **given))(args, of_lse, data)

    return jax.jit(both)


def read(args: Inputs, data: dict[str, Any], **options: Any) -> Outputs:
    """Call the op with arguments, other arrays, and what is static."""
    return Outputs(*attention_with_lse(**args._asdict(), **data, **options))


def run(
    args: Inputs,
    form: str,
    *,
    lag: int = 0,
    segment_ids: Any = None,
    places: Places | None = None,
    dropout: Dropout | None = None,
    of_lse: bool = True,
    **options: Any,
) -> tuple[Outputs, Inputs]:
    """Return the outputs and gradients of a form of the op as `direct` does, in NumPy.

    Calls of the same shapes and `options` run the same program.
    """
    rate, key = (None, None) if dropout is None else dropout
    program = _program(form, rate, tuple(sorted({"lag": lag, **options}.items())))
    data = {"segment_ids": segment_ids, "places": places}
    return jax.tree.map(np.asarray, program(args, np.float32(of_lse), key, data))


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
