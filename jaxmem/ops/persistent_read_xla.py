"""The persistent read in plain JAX: all weights at once where they are small, else by queries.

Weights are pair-major, [RH P M] with M = B T. Then all six products of a training step contract an
axis that is contiguous or leading. With time-major weights the two products that give the gradients
of the tables are transposed, and XLA's CPU backend takes four times as long for them (measured: 2.5
against 0.64 ms each at H 4, M 768, P 448, K 32).

With weights p, dropout factors c, logits s and a dot for tangents, lse' = Σ_p p s', and the tangent
of a bank's read y is Σ_p p c (s' v + v') - lse' y.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import softmax_weights
from jaxmem.ops.linear_map import known_tangents, linear_map
from pallas_kernels._compat import Precision, vary_like
from pallas_kernels._dropout import kept
from pallas_kernels.persistent_read import Operands

WEIGHTS_LIMIT = 8 * 2**20
"""Bytes of the weights (R, H, P, B·T) up to which they are computed all at once.

Then they are also kept for the backward pass. Beyond, it walks over blocks of queries whose weights
fit, and the backward pass computes them again: besides the memory that saves time once weights
leave the caches (on a CPU, 29 MB of weights: 104 ms for forward and backward in blocks, 128 at
once).
"""


class Rule(NamedTuple):
    """The static part of a call."""

    rate: float
    """Probability of dropping a weight."""
    precision: Precision | None


class Tangents(NamedTuple):
    """Tangents of a call; None: zero."""

    q: Array | None
    """Of scale q [M H K], in the scale's dtype."""
    keys: Array | None
    values: Array | None


class _PerQuery(NamedTuple):
    """What belongs to queries, which are the last axis."""

    q: Array
    """[RH K M]"""
    y: Array
    """The read of every bank [RH V M]."""
    lse: Array
    """Logarithms of the denominators [RH M]."""
    weights: Array | None
    """[RH P M]: what `lse` implies, where it is cheap to keep."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def read(rule: Rule, operands: Operands) -> Array:
    """Read q [M H K] from every bank and return the mean [M H V]."""
    return _mean(operands, _forward(rule, operands).y).astype(operands.values.dtype)


@functools.partial(read.defjvp, symbolic_zeros=True)
def _read_tangent(
    rule: Rule, primals: tuple[Operands], moved: tuple[Operands]
) -> tuple[Array, Array]:
    (operands,), (moving,) = primals, known_tangents(moved)
    queries, (q, _, values, scale, _) = _forward(rule, operands), operands
    dq = None if moving.q is None else moving.q.astype(scale.dtype) * scale[:, None]
    if moving.scale is not None:
        # In one product with the keys, so that the gradient of the scale needs no pass over pairs.
        of_scale = q.astype(scale.dtype) * moving.scale[:, None]
        dq = of_scale if dq is None else dq + of_scale
    tangents = Tangents(dq, moving.keys, moving.values)
    shapes = jax.eval_shape(lambda: tangents)
    y = linear_map(
        functools.partial(_tangent, rule, operands, queries),
        functools.partial(_cotangents, rule, operands, queries, shapes),
        tangents,
    )
    return _mean(operands, queries.y).astype(values.dtype), y.astype(values.dtype)


def _forward(rule: Rule, operands: Operands) -> _PerQuery:
    values = _merge_banks(operands.values)

    def block(_: None, inputs: tuple[Array, Array]) -> tuple[None, _PerQuery]:
        start, q = inputs
        logits = _logits(rule, operands, q)
        row_max = jnp.max(logits, axis=1, keepdims=True)
        weights = softmax_weights(logits, row_max)
        total = jnp.sum(weights, axis=1, keepdims=True)
        total = jnp.where(total < 0.5, 1.0, total)
        weights = weights / total
        dropped = _times(weights, _factors(rule, operands, start, q.shape[2]))
        y = _product(rule, operands, "hpv,hpm->hvm", values, dropped.astype(values.dtype))
        lse = (row_max + jnp.log(total))[:, 0]
        return None, _PerQuery(q, y, lse, weights if keep else None)

    keep = _blocks(operands).number == 1
    return _by_blocks(operands, block, None, _by_table(operands, operands.q))[1]


def _tangent(rule: Rule, operands: Operands, queries: _PerQuery, tangents: Tangents) -> Array:
    """Return the tangent of the mean read [M H V], in the scale's dtype."""
    wide = operands.scale.dtype
    stored, values = (_merge_banks(a).astype(wide) for a in operands[1:3])
    keys, read = (None if a is None else _merge_banks(a).astype(wide) for a in tangents[1:])
    product = functools.partial(_product, rule, operands)

    def block(_: None, inputs: tuple[Array, tuple[_PerQuery, Array | None]]) -> tuple[None, Array]:
        start, (mine, dq) = inputs
        weights = _weights(rule, operands, mine)
        factors = _factors(rule, operands, start, weights.shape[2])
        moving = jnp.zeros_like(weights)
        if dq is not None:
            moving += product("hpk,hkm->hpm", stored, dq)
        if keys is not None:
            moving += product("hpk,hkm->hpm", keys, mine.q.astype(wide) * _scales(operands))
        shares = weights * moving
        y = product("hpv,hpm->hvm", values, _times(shares, factors))
        if read is not None:
            y += product("hpv,hpm->hvm", read, _times(weights, factors))
        return None, y - mine.y * jnp.sum(shares, axis=1, keepdims=True)

    dq = None if tangents.q is None else _by_table(operands, tangents.q)
    y = _by_blocks(operands, jax.checkpoint(block), None, (queries, dq))[1]
    return _mean(operands, y)


def _cotangents(
    rule: Rule, operands: Operands, queries: _PerQuery, shapes: Tangents, dy: Array
) -> Tangents:
    """Return the transpose of `_tangent`: ds = p (c dp - Δ) with Δ = Σ_p p c dp.

    Δ is <dy, y> too, but then the ds of a query sum up to the rounding of y, which a large scale
    magnifies: the gradient of the scale had a third more error. A pass over dy is saved besides.
    """
    q, values = operands.q, _merge_banks(operands.values)
    stored, wide = _merge_banks(operands.keys).astype(q.dtype), operands.scale.dtype
    product = functools.partial(_product, rule, operands)

    def block(total: tuple, inputs: tuple[Array, tuple[_PerQuery, Array]]) -> tuple:
        start, (mine, dy) = inputs
        weights = _weights(rule, operands, mine)
        factors = _factors(rule, operands, start, weights.shape[2])
        dweights = _times(product("hpv,hvm->hpm", values, dy), factors)
        delta = jnp.sum(weights * dweights, axis=1, keepdims=True)
        dlogits = (weights * (dweights - delta)).astype(q.dtype)
        read = _times(weights, factors).astype(values.dtype)
        dkeys = product("hpm,hkm->hpk", dlogits, mine.q)
        dvalues = product("hpm,hvm->hpv", read, dy)
        # XLA would fold the transposition of this gradient into the product, which is slower.
        dq = lax.optimization_barrier(product("hpk,hpm->hkm", stored, dlogits))
        return (total[0] + dkeys, total[1] + dvalues), dq

    dy = _by_table(operands, dy / len(operands.keys))
    zeros = tuple(vary_like(jnp.zeros(a.shape, wide), operands, dy) for a in (stored, values))
    inputs = (queries, dy.astype(values.dtype))
    (dkeys, dvalues), dq = _by_blocks(operands, block, zeros, inputs)
    dq = jnp.sum(_split_banks(operands, dq), axis=0)
    dkeys = (dkeys * _scales(operands)).reshape(operands.keys.shape)
    found = (jnp.moveaxis(dq, 2, 0), dkeys, dvalues.reshape(operands.values.shape))
    asked = (None if s is None else a.astype(s.dtype) for a, s in zip(found, shapes, strict=True))
    return Tangents(*asked)


class _Blocks(NamedTuple):
    """How queries are cut; one block holds all of them where weights are small."""

    number: int
    size: Any


def _blocks(operands: Operands) -> _Blocks:
    rows, (banks, heads, pairs, _) = operands.q.shape[0], operands.values.shape
    fitting = WEIGHTS_LIMIT // (banks * heads * pairs * operands.scale.dtype.itemsize)
    if not isinstance(rows, int) or rows <= fitting:  # a symbolic number of rows is one block
        return _Blocks(1, rows)
    size = max(128, fitting // 128 * 128)
    return _Blocks(-(-rows // size), size)


def _by_blocks(operands: Operands, block: Callable, total: Any, inputs: Any) -> tuple[Any, Any]:
    """Scan block(total, (first query, inputs)) over blocks of the last axis, in inputs and outputs.

    The last block is filled up with zeros.
    """
    blocks, rows = _blocks(operands), operands.q.shape[0]
    if blocks.number == 1:
        return block(total, (jnp.int32(0), inputs))

    def cut(x: Array) -> Array:
        fill = blocks.number * blocks.size - rows
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks.number, blocks.size), -2, 0)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)[..., :rows]

    starts = jnp.arange(blocks.number, dtype=jnp.int32) * blocks.size
    total, outputs = lax.scan(block, total, (starts, jax.tree.map(cut, inputs)))
    return total, jax.tree.map(joined, outputs)


def _weights(rule: Rule, operands: Operands, queries: _PerQuery) -> Array:
    if queries.weights is not None:
        return queries.weights
    return softmax_weights(_logits(rule, operands, queries.q), queries.lse[:, None])


def _merge_banks(table: Array) -> Array:
    """Treat banks as further heads, [R H ...] to [RH ...].

    A product that contracts over banks and pairs at once is rewritten by XLA with copies of the
    weights, so banks are a batch axis throughout.
    """
    return table.reshape(-1, *table.shape[2:])


def _split_banks(operands: Operands, x: Array) -> Array:
    """Undo `_merge_banks` for what belongs to queries, [RH ...] to [R H ...]."""
    return x.reshape(*operands.keys.shape[:2], *x.shape[1:])


def _by_table(operands: Operands, x: Array) -> Array:
    """Lay queries out last, [M H K] to [RH K M], with a copy for every bank."""
    return jnp.tile(jnp.moveaxis(x, 0, 2), (len(operands.keys), 1, 1))


def _mean(operands: Operands, y: Array) -> Array:
    """Average the reads of banks, [RH V M] to [M H V]."""
    return jnp.moveaxis(jnp.mean(_split_banks(operands, y), axis=0), 2, 0)


def _scales(operands: Operands) -> Array:
    return jnp.tile(operands.scale, len(operands.keys))[:, None, None]


def _logits(rule: Rule, operands: Operands, q: Array) -> Array:
    keys = _merge_banks(operands.keys).astype(q.dtype)
    precise = rule._replace(precision=rule.precision or "high")
    return _product(precise, operands, "hpk,hkm->hpm", keys, q) * _scales(operands)


def _product(rule: Rule, operands: Operands, formula: str, a: Array, b: Array) -> Array:
    dtype = operands.scale.dtype
    return jnp.einsum(formula, a, b, precision=rule.precision, preferred_element_type=dtype)


def _factors(rule: Rule, operands: Operands, start: Array, size: Any) -> Array | None:
    """Return the dropout factors of a block [RH P m] whose first query is `start`."""
    if operands.seed is None:
        return None
    rows, (banks, heads, pairs, _) = operands.q.shape[0], operands.values.shape
    place = jnp.arange(banks * heads)[:, None, None] * rows + start + jnp.arange(size)
    low, high = operands.seed
    return kept(low, high, place, jnp.arange(pairs)[:, None], rule.rate)


def _times(weights: Array, factors: Array | None) -> Array:
    return weights if factors is None else weights * factors
