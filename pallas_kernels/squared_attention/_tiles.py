"""What the kernels of squared attention share: which tiles to visit, and the products of one tile.

A tile has a query axis and a key axis. A document is a stretch of tokens, so that one number per
token, where its document starts or ends, says with the causal order which pairs are visible.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision, load, mm, pl
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import LOG2_E, vector
from pallas_kernels.pairs import Decay


class Operands(NamedTuple):
    """What squared attention takes."""

    q: Any
    """Queries [B T H K]."""
    k: Any
    """Keys [B T H K], of the queries' dtype."""
    v: Any
    """Values [B T H V]."""
    decay: Decay | None
    """Cumulative log decay F in two words at queries and keys; None: F = 0."""
    document: Any
    """Number of each token's document [B T], int32, never decreasing; None: one document."""


class Outputs(NamedTuple):
    """What squared attention returns, and in the backward pass the cotangents of that."""

    y: Any
    """[B T H V] in the dtype of the values, float32 for float16."""
    total: Any
    """[B T H], float32."""


class Call(NamedTuple):
    """What is static in a call."""

    tokens: int
    """T"""
    width: int
    """Of queries and keys, K."""
    value_width: int
    scale: float
    block_q: int
    block_k: int
    precision: Precision
    """Of float32 products."""
    interpret: bool


def call_of(
    q: Array,
    v: Array,
    scale: float,
    blocks: tuple[int, int],
    precision: Precision | None,
    interpret: bool,
) -> Call:
    """Describe a call with tiles of (queries, keys).

    Squaring doubles the relative error of a product, so float32 operands take three TF32 passes
    unless another precision is asked for; float16 has no more bits than TF32.
    """
    wide = jnp.float32 in (q.dtype, v.dtype)
    precision = precision or ("high" if wide else "default")
    return Call(q.shape[1], q.shape[3], v.shape[3], scale, *blocks, precision, interpret)


class Range(NamedTuple):
    """Blocks from first to before end."""

    first: Any
    end: Any
    masked: bool
    """Whether some of their pairs may be invisible."""


class Side(NamedTuple):
    """Vectors of the queries or the keys of a tile, already broadcast along its other axis."""

    index: Array
    edge: Array | None
    """Of queries the first key that they see, of keys the last query that sees them."""
    exponent: Any
    """First word of the decay's exponent; None without decay."""
    rest: Any
    """Its second word, in units of log 2."""


def first_tokens(document: Array | None) -> Array | None:
    """Return where the document of each token starts [B T], int32."""
    if document is None:
        return None
    starts = jnp.where(_changes(document, 0), jnp.arange(document.shape[1], dtype=jnp.int32), 0)
    return lax.cummax(starts, axis=1)


def last_tokens(document: Array | None) -> Array | None:
    """Return where the document of each token ends [B T], int32."""
    if document is None:
        return None
    last = document.shape[1] - 1
    ends = jnp.where(_changes(document, 1), jnp.arange(last + 1, dtype=jnp.int32), last)
    return lax.cummin(ends, axis=1, reverse=True)


def _changes(document: Array, after: int) -> Array:
    """Return which documents differ from the token before, or with after=1 from that after."""
    differs = document[:, 1:] != document[:, :-1]
    return jnp.pad(differs, ((0, 0), (1 - after, after)))


def key_blocks(call: Call, start: Array, first_ref: Any) -> list[Range]:
    """Return the key blocks that the queries from `start` on see.

    The first ones may hold other documents, the last ones the diagonal.
    """
    last = jnp.minimum(start + call.block_q, call.tokens) - 1
    diagonal, end = (start + 1) // call.block_k, last // call.block_k + 1
    if first_ref is None:
        return [Range(0, diagonal, False), Range(diagonal, end, True)]
    first, full = load(first_ref.at[start]) // call.block_k, load(first_ref.at[last])
    full = jnp.minimum(_ceil(full, call.block_k), end)
    diagonal = jnp.maximum(diagonal, full)
    return [Range(first, full, True), Range(full, diagonal, False), Range(diagonal, end, True)]


def query_blocks(call: Call, start: Array, last_ref: Any) -> list[Range]:
    """Return the query blocks that see the keys from `start` on.

    The first ones hold the diagonal, the last ones may hold other documents or exceed the row.
    """
    last = jnp.minimum(start + call.block_k, call.tokens) - 1
    first, full = start // call.block_q, _ceil(start + call.block_k - 1, call.block_q)
    if last_ref is None:
        whole, end = jnp.int32(call.tokens // call.block_q), _ceil(call.tokens, call.block_q)
    else:
        whole = (load(last_ref.at[start]) + 1) // call.block_q
        end = load(last_ref.at[last]) // call.block_q + 1
    full = jnp.minimum(full, end)
    whole = jnp.maximum(whole, full)
    return [Range(first, full, True), Range(full, whole, False), Range(whole, end, True)]


def walk(ranges: list[Range], visit: Callable, carry: Any) -> Any:
    """Visit the blocks of ranges in order with visit(block, carry, masked=...)."""
    for first, end, masked in ranges:
        carry = lax.fori_loop(first, end, functools.partial(visit, masked=masked), carry)
    return carry


def specs(operands: Operands) -> Operands:
    """Return the block of each operand for one program of a grid (block, head, row).

    It holds all tokens of a head.
    """
    q, k, v, document = (whole(a) for a in (operands.q, operands.k, operands.v, operands.document))
    return Operands(q, k, v, by_head(operands.decay), document)


def whole(arrays: Any) -> Any:
    """Return blocks of all tokens of a head, of arrays [B T], [B T H] or [B T H K]."""
    return jax.tree.map(lambda a: _spec(a, a.shape[1]), arrays)


def by_head(arrays: Any) -> Any:
    """Return blocks of all tokens of a head, of arrays [B H T] such as a decay's."""
    return jax.tree.map(
        lambda a: pl.BlockSpec((None, None, a.shape[2]), lambda i, h, b: (b, h, 0)), arrays
    )


def owned(array: Any, size: int, at: Callable[[Any], Any]) -> Any:
    """Return the block of an output [B T H] or [B T H K] that a program of a grid owns.

    It holds `size` tokens, from size · at(block) on.
    """
    return _spec(array, size, at)


def _spec(array: Any, size: int, at: Callable[[Any], Any] = lambda i: 0) -> Any:
    if array.ndim == 2:
        return pl.BlockSpec((None, size), lambda i, h, b: (b, at(i)))
    if array.ndim == 3:
        return pl.BlockSpec((None, size, None), lambda i, h, b: (b, at(i), h))
    padded = power_of_two(array.shape[3])
    return pl.BlockSpec((None, size, None, padded), lambda i, h, b: (b, at(i), h, 0))


def queries_of(call: Call, start: Any, edges: Any, decay: Decay | None, axis: int) -> Side:
    """Describe the queries from `start` on; `axis` is that of queries in the tile."""
    words = (None, None) if decay is None else (decay.query, decay.query_rest)
    return _side(call, start, call.block_q, edges, words, axis)


def keys_of(call: Call, start: Any, edges: Any, decay: Decay | None, axis: int) -> Side:
    """Describe the keys from `start` on; `axis` is that of keys in the tile."""
    words = (None, None) if decay is None else (decay.key, decay.key_rest)
    return _side(call, start, call.block_k, edges, words, axis)


def _side(call: Call, start: Any, size: int, edges: Any, words: tuple, axis: int) -> Side:
    def numbers(ref: Any) -> Array | None:
        if ref is None:
            return None
        return jnp.expand_dims(vector(ref, start, size, call.tokens), 1 - axis)

    index = jnp.expand_dims(start + lax.iota(jnp.int32, size), 1 - axis)
    exponent, rest = map(numbers, words)
    return Side(index, numbers(edges), exponent, None if rest is None else rest * LOG2_E)


def visible(call: Call, queries: Side, keys: Side) -> Array:
    """Return which pairs of a tile are visible; one side knows the edges of documents, if any."""
    seen = (keys.index <= queries.index) & (queries.index < call.tokens)
    if queries.edge is not None:
        seen &= queries.edge <= keys.index
    if keys.edge is not None:
        seen &= queries.index <= keys.edge
    return seen


def faded(products: Array, queries: Side, keys: Side) -> Array:
    """Multiply a tile by the decay between its keys and its queries.

    The first words of two exponents are multiples of one power of two, so their difference is
    exact; rounding touches only that of the small second words.
    """
    if queries.exponent is None:
        return products
    between = (queries.exponent - keys.exponent) * LOG2_E + (queries.rest - keys.rest)
    return products * jnp.exp2(between)


def dots(call: Call, a: Array, b: Array) -> Array:
    """Return a bᵀ in float32, for operands of different dtypes at the wider one."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return _mm(call, a.astype(dtype), b.astype(dtype), tb=True)


def scores(call: Call, a: Array, b: Array) -> Array:
    """Return scale a bᵀ; scaled before it is squared, it need not overflow or vanish there."""
    return call.scale * dots(call, a, b)


def weighted(call: Call, weights: Array, values: Array) -> Array:
    """Return the product of float32 weights and a tile, at the dtype of the tile.

    Float16 tiles are widened: they have the bits of TF32, but weights have no bound and would
    overflow there.
    """
    dtype = jnp.float32 if values.dtype == jnp.float16 else values.dtype
    return _mm(call, weights.astype(dtype), values.astype(dtype))


def _mm(call: Call, a: Array, b: Array, *, tb: bool = False) -> Array:
    return mm(a, b, tb=tb, precision=call.precision, interpret=call.interpret)


def _ceil(number: Any, block: int) -> Any:
    return (number + (block - 1)) // block
