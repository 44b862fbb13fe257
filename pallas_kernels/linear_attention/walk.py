"""The walk that all passes of linear attention are: over chunks of tokens, with a matrix state.

With D_ij what the gates between tokens j and i let through (0 across documents), a walk computes

    out_i = scale Σ_j D_ij <query_i, key_j> value_j    over j <= i, or in reverse over j >= i.

That is y for (query, key, value) = (q, k, v); dq for (dy, v, k); in reverse, dv for (k, q, dy) and
dk for (v, dy, q). So there is one kernel, and each pass splits the width of its own result over
programs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision, launch, load, mm, pl, store
from pallas_kernels._launch import power_of_two
from pallas_kernels._tiles import LOG2_E, along
from pallas_kernels.linear_attention.launch import Tiling

_LOWEST = -1024.0
"""Log2 of a gate that leaves nothing even of the largest float32."""
_GRAIN = 64.0
"""The coarse word of a gate is a multiple of its inverse."""


class Inputs(NamedTuple):
    """Operands of a walk; of query, key and value some may have fewer heads, each shared."""

    query: Any
    """Reads the state [B T . W]."""
    key: Any
    """Writes to the state [B T . W]."""
    value: Any
    """Written to the state [B T . P]."""
    log_decay: Any
    """[B T H] float32, or None: nothing is forgotten."""
    document: Any
    """[B T] int32, or None: all tokens belong to the document of the state."""
    state: Any
    """State at the start [B H W P], float32."""
    sums: Any = None
    """The same for values of 1 [B H W], or None; with `extra` for products <query, key> of 1
    [B H P]."""
    extra: Any = None
    """Number per token that wrote y [B T H], added to each of its <query, key>, or None."""
    multiplier: Any = None
    """Factor of the result, token by token [B T . P], for `dot_with_multiplier`; or None."""


class Outputs(NamedTuple):
    """What a walk may write."""

    out: Any
    """[B T H P]"""
    state: Any = None
    """State at the end [B H W P], float32."""
    sums: Any = None
    """As in `Inputs`, at the end."""
    total: Any = None
    """The result for values of 1 [B T H], float32."""
    dot_with_multiplier: Any = None
    """<multiplier, out> of each block of P [N B T H], float32, without a token's own part."""


class Wanted(NamedTuple):
    """Which outputs a walk writes besides `out`."""

    state: bool = False
    sums: bool = False
    total: bool = False


class Call(NamedTuple):
    """What is static in a walk."""

    length: int
    width: int
    """W"""
    columns: int
    """P"""
    scale: float
    chunk: int
    block: int
    """Columns of P that a program owns."""
    reverse: bool
    transposed: bool
    """Whether states are [P W]."""
    dtype: Any
    """Of the operands of products."""
    pairs: Precision
    """Of <query, key>."""
    rest: Precision
    """Of the other products."""
    interpret: bool


class Chunk(NamedTuple):
    """What the tokens of a chunk let through; a number stands for a vector of it."""

    reads: Any
    """From the state that comes to each token [C]."""
    writes: Any
    """From each token to the state that goes on [C]."""
    across: Any
    """From the state that comes to the one that goes on."""
    between: Array | None
    """From token to token [C C], axis 0 reads; None: everything."""
    seen: Array
    """What a token reads at all [C C]."""


def walk(
    inputs: Inputs,
    tiling: Tiling,
    *,
    name: str,
    scale: float,
    dtype: Any,
    wanted: Wanted,
    reverse: bool = False,
    transposed: bool = False,
    precision: Precision | None,
    interpret: bool,
) -> Outputs:
    """Run one walk; grid (P / block, H, B).

    A program owns `block` columns of the result of one head and walks over its chunks of C tokens
    with the state [W, block] in registers: out = (scale D ⊙ query keyᵀ) value + read ⊙ (query S)
    and S' = across S + keyᵀ (write ⊙ value). It holds Sᵀ: the second operand of a product takes
    registers in every warp, and so queries and keys, which come from shared memory, are second.
    Accumulated and carried in float32; operands of products are bfloat16 where all three are, else
    float32: a state or a logit may exceed float16.

    Shared memory: `launch.shared_bytes`. FLOPs per token and program: 2 C (W + block) +
    4 W block; bytes of queries, keys, values and the result, the first two once per block, mostly
    from the cache.

    Args:
      inputs: what to read.
      tiling: chunk, block, warps and stages.
      name: of the kernel.
      scale: factor of the result.
      dtype: dtype of the result.
      wanted: further outputs.
      reverse: whether a token reads those after it, and the state is that of the end.
      transposed: whether states are [B H P W] rather than [B H W P].
      precision: of float32 products; None: three TF32 passes for <query, key>, one
        for the rest.
      interpret: evaluate with plain JAX instead of a GPU.
    """
    batch, length, _, columns = inputs.value.shape
    heads = inputs.state.shape[1]
    call = _call_of(inputs, tiling, scale, reverse, transposed, precision, interpret)
    blocks = -(-columns // call.block)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_token = float32((batch, length, heads))
    dots = float32((blocks, *per_token.shape))
    shapes = Outputs(
        out=jax.ShapeDtypeStruct((batch, length, heads, columns), dtype),
        state=float32(inputs.state.shape) if wanted.state else None,
        sums=float32(inputs.sums.shape) if wanted.sums else None,
        total=per_token if wanted.total else None,
        dot_with_multiplier=None if inputs.multiplier is None else dots,
    )
    spec = functools.partial(_spec, call, heads)
    sums = "bhp" if inputs.extra is not None else "bhw"
    state = "bhpw" if transposed else "bhwp"
    in_axes = Inputs("btgw", "btgw", "btgp", "bth", "bt", state, sums, "bth", "btgp")
    out_axes = Outputs("bthp", state, sums, "bth", "nbth")
    return launch(
        functools.partial(_kernel, call=call),
        name=name,
        grid=(blocks, heads, batch),
        in_specs=[_specs(spec, inputs, in_axes)],
        out_specs=[_specs(spec, shapes, out_axes)],
        out_shape=[shapes],
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        interpret=interpret,
    )(inputs)[0]


def _call_of(
    inputs: Inputs,
    tiling: Tiling,
    scale: float,
    reverse: bool,
    transposed: bool,
    precision: Precision | None,
    interpret: bool,
) -> Call:
    half = all(x.dtype == jnp.bfloat16 for x in (inputs.query, inputs.key, inputs.value))
    # Half-precision numbers are TF32 numbers: one product of them is exact.
    wide = all(x.dtype == jnp.float32 for x in (inputs.query, inputs.key))
    columns = inputs.value.shape[3]
    return Call(
        length=inputs.value.shape[1],
        width=inputs.query.shape[3],
        columns=columns,
        scale=scale,
        chunk=tiling.chunk,
        block=min(tiling.block, power_of_two(columns)),
        reverse=reverse,
        transposed=transposed,
        dtype=jnp.bfloat16 if half else jnp.float32,
        pairs=precision or ("high" if wide else "default"),
        rest=precision or "default",
        interpret=interpret,
    )


def _specs(spec: Any, arrays: Any, axes: Any) -> Any:
    """Return the blocks of a tuple of arrays, None where an array is None."""
    return type(arrays)(
        *(None if x is None else spec(x, a) for x, a in zip(arrays, axes, strict=True))
    )


def _spec(call: Call, heads: int, array: Any, axes: str) -> Any:
    """Return the block of one program in the grid (block, head, row).

    `axes` names the axes: b row, t token, h head, g head that may be shared, w width, p column, n
    block of columns.
    """
    sizes = {"t": call.length, "w": power_of_two(call.width), "p": call.block}
    share = heads // array.shape[2] if "g" in axes else 1

    def at(block: Any, head: Any, row: Any) -> tuple:
        where = {"b": row, "h": head, "g": head // share, "p": block, "n": block}
        return tuple(where.get(axis, 0) for axis in axes)

    return pl.BlockSpec(tuple(sizes.get(axis) for axis in axes), at)


def _kernel(refs: Inputs, outs: Outputs, *, call: Call) -> None:
    block = pl.program_id(0)
    wide = lax.iota(jnp.int32, refs.query.shape[-1]) < call.width
    mine = block * call.block + lax.iota(jnp.int32, call.block) < call.columns
    summed = wide if refs.extra is None else mine
    number = -(-call.length // call.chunk)

    def step(n: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        state, sums = carry
        at = (number - 1 - n if call.reverse else n) * call.chunk
        inside = at + lax.iota(jnp.int32, call.chunk) < call.length
        query, key = (_tile(call, ref, at, inside, wide) for ref in (refs.query, refs.key))
        value = _tile(call, refs.value, at, inside, mine)
        extra = None if refs.extra is None else _vector(call, refs.extra, at, inside)
        chunk = _chunk(call, refs, at, inside)
        pairs, weights = _weights(call, chunk, query, key, extra)
        read = _read_state(call, query, extra, state, sums)
        out = _product(call, weights.astype(call.dtype), value)
        out += _column(chunk.reads) * read
        tokens = pl.ds(at, call.chunk)
        if refs.multiplier is not None:
            multiplier = load(refs.multiplier.at[tokens, :], inside[:, None] & mine[None, :])
            dots = jnp.sum(_wide(multiplier) * out, axis=1)
            store(outs.dot_with_multiplier.at[tokens], dots, inside)
            out += jnp.sum(jnp.where(_same(call), pairs, 0.0), axis=1)[:, None] * _wide(value)
        store(outs.out.at[tokens, :], out, inside[:, None] & mine[None, :])
        if outs.total is not None:
            # Loaded again: as an operand of a product, it takes registers in every warp.
            again = load(refs.query.at[tokens, :], inside[:, None] & wide[None, :])
            read = jnp.sum(_wide(again) * sums[None, :], axis=1)
            total = jnp.sum(weights, axis=1) + chunk.reads * read
            store(outs.total.at[tokens], total, inside & (block == 0))
        written = _column(chunk.writes) * _wide(value)
        state = chunk.across * state + _product(call, written.astype(call.dtype), key, ta=True)
        if sums is not None:
            again = load(refs.key.at[tokens, :], inside[:, None] & wide[None, :])
            sums = chunk.across * sums + _summed(call, chunk, again, written, extra)
        return state, sums

    state = load(refs.state, _cells(call, wide, mine))
    state = state if call.transposed else state.T
    sums = None if refs.sums is None else load(refs.sums, summed)
    state, sums = lax.fori_loop(0, number, step, (state, sums))
    if outs.state is not None:
        store(outs.state, state if call.transposed else state.T, _cells(call, wide, mine))
    if outs.sums is not None:
        store(outs.sums, sums, summed if refs.extra is not None else summed & (block == 0))


def _weights(
    call: Call, chunk: Chunk, query: Array, key: Array, extra: Array | None
) -> tuple[Array, Array]:
    """Return the scaled products of the pairs of a chunk, and what is left of those seen."""
    pairs = mm(query, key, tb=True, precision=call.pairs, interpret=call.interpret)
    if extra is not None:
        pairs += along(extra, 1 if call.reverse else 0)
    pairs = pairs * call.scale
    weights = pairs if chunk.between is None else pairs * chunk.between
    # A pair that is not seen may have any decay, even an infinite one.
    return pairs, jnp.where(chunk.seen, weights, 0.0)


def _read_state(call: Call, query: Array, extra: Array | None, state: Array, sums: Any) -> Array:
    """Return what the tokens of a chunk read of the state, as if nothing decayed."""
    read = _product(call, state.astype(call.dtype), query, tb=True).T
    if extra is not None:
        read += sums[None, :] if call.reverse else extra[:, None] * sums[None, :]
    return read


def _summed(call: Call, chunk: Chunk, key: Array, written: Array, extra: Array | None) -> Array:
    """Return what the tokens of a chunk add to the sums."""
    if extra is None:
        written = _column(chunk.writes) * _wide(key)
    elif call.reverse:
        written = extra[:, None] * written
    return jnp.sum(written, axis=0)


def _chunk(call: Call, refs: Inputs, at: Array, inside: Array) -> Chunk:
    """Work out what the gates and documents of a chunk let through.

    The scale belongs to tokens that wrote y, so it is met at their side of the state.
    """
    since = until = across = jnp.float32(1.0)
    between = None
    seen = _order(call, strict=refs.multiplier is not None)
    if refs.log_decay is not None:
        since, until, across, between = _decays(call, refs.log_decay, at, inside)
    if refs.document is not None:
        before, last = _document(call, refs, at - 1), _document(call, refs, at + call.chunk - 1)
        now = _document(call, refs, at + lax.iota(jnp.int32, call.chunk))
        since = jnp.where(now == before, since, 0.0)
        until = jnp.where(now == last, until, 0.0)
        across = jnp.where(before == last, across, 0.0)
        seen &= now[:, None] == now[None, :]
    since = since * call.scale
    reads, writes = (until, since) if call.reverse else (since, until)
    return Chunk(reads, writes, across, between, seen)


def _decays(call: Call, ref: Any, at: Array, inside: Array) -> tuple[Array, Array, Array, Array]:
    """Return what passes since the chunk began, until it ends, across it and between its tokens.

    A sum of gates has two words. The coarse ones are multiples of 1/64 below 2^17, so that sums and
    differences of them are exact; rounding touches only that of the small fine words. Without this
    a strong gate would cost the weak ones after it their digits.
    """
    gate = jnp.maximum(_vector(call, ref, at, inside) * LOG2_E, _LOWEST)
    coarse = jnp.floor(gate * _GRAIN) / _GRAIN
    words = (coarse, gate - coarse)
    ahead = [jnp.cumsum(word) for word in words]
    total = [jnp.sum(word) for word in words]
    since = jnp.exp2(ahead[0] + ahead[1])
    until = jnp.exp2((total[0] - ahead[0]) + (total[1] - ahead[1]))
    late, early = (1, 0) if call.reverse else (0, 1)
    coarse, fine = (along(word, late) - along(word, early) for word in ahead)
    return since, until, jnp.exp2(total[0] + total[1]), jnp.exp2(coarse + fine)


def _order(call: Call, *, strict: bool) -> Array:
    """Return whether token (axis 1) is read by token (axis 0), for the order of tokens alone."""
    order = lax.iota(jnp.int32, call.chunk)
    late, early = (1, 0) if call.reverse else (0, 1)
    before = along(order, early) < along(order, late)
    return before if strict else before | _same(call)


def _same(call: Call) -> Array:
    order = lax.iota(jnp.int32, call.chunk)
    return order[:, None] == order[None, :]


def _document(call: Call, refs: Inputs, rows: Array) -> Array:
    """Return the documents of tokens; before the first is the state's, the last one lasts."""
    document = load(refs.document.at[jnp.clip(rows, 0, call.length - 1)])
    return jnp.where(rows < 0, 0, document)


def _tile(call: Call, ref: Any, at: Array, inside: Array, columns: Array) -> Array:
    """Load a chunk of tokens as an operand, zero outside."""
    rows = pl.ds(at, call.chunk)
    return load(ref.at[rows, :], inside[:, None] & columns[None, :]).astype(call.dtype)


def _vector(call: Call, ref: Any, at: Array, inside: Array) -> Array:
    """Load a number per token of a chunk in float32, zero outside."""
    return load(ref.at[pl.ds(at, call.chunk)], inside).astype(jnp.float32)


def _cells(call: Call, wide: Array, mine: Array) -> Array:
    """Return which cells of a state exist."""
    first, second = (mine, wide) if call.transposed else (wide, mine)
    return first[:, None] & second[None, :]


def _product(call: Call, a: Array, b: Array, *, ta: bool = False, tb: bool = False) -> Array:
    return mm(a, b, ta=ta, tb=tb, precision=call.rest, interpret=call.interpret)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _column(factor: Array) -> Array:
    """Return a factor per token as [C, 1]."""
    return factor[:, None] if factor.ndim else factor
