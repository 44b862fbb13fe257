"""What the attention kernels share: which tiles to visit, and the logits and dropout of one tile.

A tile has a query axis and a key axis. What belongs to queries or keys alone is worked out on
vectors; a tile costs two comparisons for visibility, or none where all of it is visible.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import _dropout
from pallas_kernels._compat import Precision, load, mm, pl
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import LOG2_E, along, vector
from pallas_kernels.pairs import FAR, Decay, Places


class Bounds(NamedTuple):
    """For each block of one axis, which blocks of the other it must visit, [B N] int32."""

    first: Any
    end: Any


class Rule(NamedTuple):
    """What is static in a call but for its sizes: visibility, dropout, precision, clamp."""

    lag: int = 0
    """A key is visible from this many places after it on."""
    window: int | None = None
    """To fewer than this many places after it; None: for ever."""
    rate: float = 0.0
    """Probability of dropping a weight."""
    precision: Precision | None = None
    """Of float32 products; None: three TF32 passes for logits, one for values and gradients."""
    clamp: float | None = None
    """Largest scale q·k; what exceeds it is set to it. None: unbounded."""
    causal: bool = True
    """Whether order counts without `places`: else every query sees every key."""
    in_order: bool = True
    """Whether no query sees a key of a higher index than its own."""


class Operands(NamedTuple):
    """The arrays of a call."""

    q: Any
    """Queries [B T H K]."""
    k: Any
    """Keys [B S G K], of the queries' dtype; G divides H."""
    v: Any
    """Values [B S G V]."""
    scale: Any
    """Factor of the logits [H], float32 or wider."""
    places: Places | None = None
    """Where queries and keys stand, int32; None: at their index."""
    decay: Decay | None = None
    """Cumulative log forget gates F; None: F = 0."""
    gate: Any = None
    """Factors of the values [B H S], of the scale's dtype; None: 1."""
    seed: Any = None
    """Words of the dropout's seed [2], uint32; None without dropout."""


class Saved(NamedTuple):
    """What a backward pass knows of the queries, float32."""

    lse: Any
    """Logarithm to base 2 of the softmax's denominator [B H T]."""
    dy: Any
    """Cotangent of y [B T H V], of the values' dtype."""
    delta: Any
    """Δ = <dy, y> less the cotangent of the log-sum-exp [B H T]."""


class Call(NamedTuple):
    """What is static in a launch: sizes, tiles, and the fields of the rule."""

    queries: int
    """T"""
    keys: int
    """S"""
    heads: int
    groups: int
    """Key/value heads."""
    width: int
    """Of keys, K."""
    value_width: int
    block_q: int
    block_k: int
    interpret: bool
    lag: int
    window: int | None
    rate: float
    precision: Precision | None
    clamp: float | None
    causal: bool
    in_order: bool


def call_of(operands: Operands, rule: Rule, blocks: tuple[int, int], interpret: bool) -> Call:
    """Describe a call with tiles of (queries, keys)."""
    q, k, v = operands[:3]
    sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], k.shape[3], v.shape[3])
    return Call(*sizes, *blocks, interpret, *rule)


class Ranges(NamedTuple):
    """Blocks to visit: [first, full) masked, [full, masked) whole, [masked, end) masked."""

    first: Any
    full: Any
    masked: Any
    end: Any


class Queries(NamedTuple):
    """Vectors of the queries of a tile, already broadcast along its key axis."""

    index: Array
    """Index of the query among all of the call, for dropout."""
    reach: Array
    """Place of the query; far below all keys where there is none."""
    segment: Array | None


class Keys(NamedTuple):
    """Vectors of the keys of a tile, already broadcast along its query axis."""

    index: Array
    first: Array
    """First place that may read the key; far above all queries where there is none."""
    segment: Array | None


def key_blocks(call: Call, block: Array, bounds: Bounds | None) -> Ranges:
    """Return the key blocks that a block of queries visits."""
    if bounds is not None:
        return _given(bounds, block)
    if not call.causal:
        whole = call.keys // call.block_k
        return Ranges(0, 0, whole, -(-call.keys // call.block_k))
    start = block * call.block_q
    end = _ceil(jnp.minimum(call.keys, start + call.block_q - call.lag), call.block_k)
    masked = jnp.maximum(start - call.lag + 1, 0) // call.block_k
    if call.window is None:
        return Ranges(0, 0, jnp.minimum(masked, end), end)
    first = jnp.maximum(start - call.window + 1, 0) // call.block_k
    full = jnp.clip(_ceil(start + call.block_q - call.window, call.block_k), first, end)
    return Ranges(first, full, jnp.clip(masked, full, end), end)


def query_blocks(call: Call, block: Array, bounds: Bounds | None) -> Ranges:
    """Return the query blocks that a block of keys is read by."""
    if bounds is not None:
        return _given(bounds, block)
    if not call.causal:
        whole = call.queries // call.block_q
        return Ranges(0, 0, whole, -(-call.queries // call.block_q))
    start = block * call.block_k
    first = (start + call.lag) // call.block_q
    full = _ceil(start + call.block_k - 1 + call.lag, call.block_q)
    last, whole = call.queries, call.queries // call.block_q
    if call.window is None:
        end = jnp.int32(-(-last // call.block_q))
    else:
        end = _ceil(jnp.minimum(last, start + call.block_k - 1 + call.window), call.block_q)
        whole = jnp.minimum(whole, (start + call.window) // call.block_q)
    full = jnp.clip(full, first, jnp.maximum(first, end))
    return Ranges(first, full, jnp.clip(whole, full, jnp.maximum(full, end)), end)


def needed_blocks(
    places: Places, lag: int, window: int | None, block_q: int, block_k: int
) -> Array:
    """Return for pairs of blocks whether one pair in them may be visible, bool [B N_q N_k].

    That is so if the ranges of their places and of their documents allow it.
    """
    q = _block_ranges(places.query, places.query_segment, block_q)
    k = _block_ranges(places.key, places.key_segment, block_k)
    of_q, of_k = (lambda a: a[:, :, None]), (lambda a: a[:, None, :])
    needed = of_k(k.nearest) + lag <= of_q(q.furthest)
    needed &= of_k(k.low) <= of_q(q.high)
    needed &= of_q(q.low) <= of_k(k.high)
    if window is not None:
        needed &= of_q(q.nearest) - of_k(k.furthest) < window
    return needed


def block_bounds(call: Call, places: Places, axis: int) -> Bounds:
    """Return for the blocks along one axis the first and last needed block of the other `axis`.

    What lies between them is visited too.
    """
    needed = needed_blocks(places, call.lag, call.window, call.block_q, call.block_k)
    first = jnp.argmax(needed, axis=axis)
    last = needed.shape[axis] - jnp.argmax(jnp.flip(needed, axis), axis=axis)
    end = jnp.where(jnp.any(needed, axis=axis), last, first)
    return Bounds(first.astype(jnp.int32), end.astype(jnp.int32))


class _BlockRanges(NamedTuple):
    nearest: Array
    furthest: Array
    low: Array
    high: Array


def _block_ranges(place: Array, segment: Array, block: int) -> _BlockRanges:
    """Return the ranges of places and documents of each block [B N]; of an empty one, none."""
    there = segment != 0

    def reduce(values: Array, sign: int) -> Array:
        padded = jnp.where(there, sign * values, FAR)
        short = -padded.shape[1] % block
        padded = jnp.pad(padded, ((0, 0), (0, short)), constant_values=FAR)
        return sign * jnp.min(padded.reshape(padded.shape[0], -1, block), axis=2)

    return _BlockRanges(
        reduce(place, 1), reduce(place, -1), reduce(segment, 1), reduce(segment, -1)
    )


def by_head(call: Call, array: Any, axes: str) -> Any:
    """Return the block of one program in a grid (block, head, row): all tokens of its head.

    `axes` names the axes of the array: b row, t token, h head, g key/value head, d width.
    """
    share = call.heads // call.groups
    return _block(array, axes, {}, lambda i, h, b: {"b": b, "h": h, "g": h // share})


def by_group(call: Call, array: Any, axes: str) -> Any:
    """Return the block of one program in a grid (block, key/value head, row): all tokens.

    Of arrays with a query head axis these are the query heads that share the key/value head.
    """
    share = call.heads // call.groups
    return _block(array, axes, {"h": share}, lambda i, g, b: {"b": b, "h": g, "g": g})


def _block(array: Any, axes: str, sizes: dict[str, int], at: Any) -> Any:
    def size(axis: str, length: int) -> int | None:
        return {"t": length, "d": power_of_two(length), **sizes}.get(axis)

    shape = tuple(size(axis, n) for axis, n in zip(axes, array.shape, strict=True))
    return pl.BlockSpec(shape, lambda *grid: tuple(at(*grid).get(axis, 0) for axis in axes))


def input_specs(spec: Callable, operands: Operands) -> Operands:
    """Return the blocks of what all three kernels read; `spec` is `by_head` or `by_group`."""
    q, k, v, scale, places, decay, gate, seed = operands
    return Operands(
        spec(q, "bthd"),
        spec(k, "btgd"),
        spec(v, "btgd"),
        pl.BlockSpec(scale.shape, lambda *grid: (0,)),
        jax.tree.map(lambda a: spec(a, "bt"), places),
        jax.tree.map(lambda a: spec(a, "bht"), decay),
        None if gate is None else spec(gate, "bht"),
        None if seed is None else pl.BlockSpec(seed.shape, lambda *grid: (0,)),
    )


def saved_specs(spec: Callable, saved: Saved) -> Saved:
    """Return the blocks of what the backward kernels read besides."""
    return Saved(spec(saved.lse, "bht"), spec(saved.dy, "bthd"), spec(saved.delta, "bht"))


def walk(ranges: Ranges, visit: Callable, carry: Any) -> Any:
    """Visit the blocks of `ranges` in order with visit(block, carry, masked)."""
    masked = functools.partial(visit, masked=True)
    carry = lax.fori_loop(ranges.first, ranges.full, masked, carry)
    carry = lax.fori_loop(ranges.full, ranges.masked, functools.partial(visit, masked=False), carry)
    return lax.fori_loop(ranges.masked, ranges.end, masked, carry)


def queries_of(call: Call, start: Any, places: Places | None, axis: int) -> Queries:
    """Describe the queries from `start` on; `axis` is that of queries in the tile."""
    index = start + lax.iota(jnp.int32, call.block_q)
    if places is None:
        last = index if call.causal else FAR - 1
        reach = jnp.where(index < call.queries, last, -FAR)
        return Queries(along(index, axis), along(reach, axis), None)
    place, segment = (
        vector(ref, start, call.block_q, call.queries)
        for ref in (places.query, places.query_segment)
    )
    reach = jnp.where(segment == 0, -FAR, place)
    return Queries(along(index, axis), along(reach, axis), along(segment, axis))


def keys_of(call: Call, start: Any, places: Places | None, axis: int) -> Keys:
    """Describe the keys from `start` on; `axis` is that of keys in the tile."""
    index = start + lax.iota(jnp.int32, call.block_k)
    if places is None:
        first = index + call.lag if call.causal else jnp.where(index < call.keys, 0, FAR)
        return Keys(along(index, axis), along(first, axis), None)
    place, segment = (
        vector(ref, start, call.block_k, call.keys) for ref in (places.key, places.key_segment)
    )
    first = jnp.where(segment == 0, FAR, place + call.lag)
    return Keys(along(index, axis), along(first, axis), along(segment, axis))


def visible(call: Call, queries: Queries, keys: Keys) -> Array:
    """Return which pairs of a tile are visible."""
    seen = keys.first <= queries.reach
    if call.window is not None:
        seen &= queries.reach - keys.first < call.window - call.lag
    if queries.segment is not None:
        seen &= queries.segment == keys.segment
    return seen


class Logits(NamedTuple):
    """Logits of a tile."""

    value: Array
    """In units of log 2."""
    over: Array | None
    """Whether scale q·k exceeds the clamp, so that no gradient reaches it; None without one."""


def logits(call: Call, a: Array, b: Array, scale: Array) -> Logits:
    """Return scale a bᵀ, clamped.

    Scales may be as large as e^22 (Memory Mosaics), which would magnify the error of TF32: unless
    another precision is asked for, float32 takes three TF32 products here.
    """
    dots = mm(a, b, tb=True, precision=call.precision or "high", interpret=call.interpret)
    if call.clamp is None:
        return Logits(dots * (scale * LOG2_E), None)
    # In units of log 2, rounding would tell what equals the clamp from it.
    dots = dots * scale
    return Logits(jnp.minimum(dots, call.clamp) * LOG2_E, dots > call.clamp)


def product(call: Call, a: Array, b: Array, *, tb: bool = False) -> Array:
    """Multiply two tiles; float32 takes one TF32 product unless another precision is asked for."""
    return mm(a, b, tb=tb, precision=call.precision or "default", interpret=call.interpret)


def decayed(
    call: Call,
    decay: Decay | None,
    logit: Array,
    head: tuple,
    q_start: Any,
    k_start: Any,
    axis: int,
) -> Array:
    """Add the log of what the gates between key and query let through; `axis`: of queries.

    The first words of two sums are multiples of one power of two, so their difference is exact;
    rounding touches only that of the small second words.
    """
    if decay is None:
        return logit

    def of_queries(ref: Any) -> Array:
        return along(vector(ref, q_start, call.block_q, call.queries, lead=head), axis)

    def of_keys(ref: Any) -> Array:
        return along(vector(ref, k_start, call.block_k, call.keys, lead=head), 1 - axis)

    between = of_queries(decay.query) - of_keys(decay.key)
    between = between + (of_queries(decay.query_rest) - of_keys(decay.key_rest))
    return logit + between * LOG2_E


def gates_of(call: Call, gate: Any, start: Any, head: tuple, axis: int) -> Array | None:
    """Return the gates of the values from `start` on, or None; `axis`: of keys in the tile."""
    if gate is None:
        return None
    return along(vector(gate, start, call.block_k, call.keys, lead=head), axis)


def dropout_mask(
    call: Call, seed_ref: Any, row: Any, head: Any, queries: Queries, keys: Keys
) -> Array | None:
    """Return the dropout factors of a tile, or None without dropout."""
    if call.rate == 0.0:
        return None
    base = (row * call.heads + head) * call.queries
    return _dropout.kept(seed_ref[0], seed_ref[1], base + queries.index, keys.index, call.rate)


def _given(bounds: Bounds, block: Array) -> Ranges:
    first, end = load(bounds.first.at[block]), load(bounds.end.at[block])
    return Ranges(first, end, end, end)


def _ceil(number: Array, block: int) -> Array:
    return (jnp.maximum(number, 0) + (block - 1)) // block
