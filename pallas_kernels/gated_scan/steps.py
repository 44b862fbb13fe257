"""What the forward and the backward kernels share: gates, grids, sums of a split."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import launch, load, pl, store
from pallas_kernels._tiles import LOG2_E
from pallas_kernels.gated_scan.launch import GatedScanConfig, Layout

PADDING, DECAY, RESET = 0, 1, 2
"""Kinds of tokens in packed rows: the state stands still, decays by its gate, or starts anew."""
_UNROLL = 8
"""Most splits whose sums are loaded together."""


class Inputs(NamedTuple):
    """Operands of the op and of its forward kernel."""

    x: Array
    """Inputs [B, T, D], any T and D."""
    log_decay: Array
    """Logarithms of the gates [B, T, D], <= 0; -inf is a reset."""
    start: Array
    """State before the first token [B, D], float32."""
    kinds: Array | None = None
    """Kind of each token of packed rows [B, T], int32; None: every token decays."""


class GradInputs(NamedTuple):
    """Operands of the backward kernel."""

    dh: Array
    """Cotangent of h [B, T, D]; what stands at padding is ignored."""
    dfinal: Array
    """Cotangent of the final state [B, D], float32."""
    h: Array
    """What the forward kernel returned."""
    log_decay: Array
    start: Array
    kinds: Array | None = None


class Tokens(NamedTuple):
    """The tokens of one program inside a kernel."""

    length: int
    """Tokens of the whole row."""
    columns: Array
    """Channels that exist, bool [P]."""
    log_decay: Any
    """Reference to the logarithms of the gates [T, P]."""
    kinds: Any
    """Reference to the kinds of tokens [T], or None."""

    def load(self, ref: Any, t: Array) -> Array:
        """Load one token in float32, zero outside."""
        row = ref.at[jnp.minimum(t, self.length - 1), :]
        return load(row, self.columns & (t < self.length)).astype(jnp.float32)

    def store(self, ref: Any, t: Array, value: Array) -> None:
        """Write one token, if it exists."""
        row = ref.at[jnp.minimum(t, self.length - 1), :]
        store(row, value, self.columns & (t < self.length))

    def kind(self, t: Array) -> Array | None:
        """Return the kind of a token, padding outside; None where all decay."""
        if self.kinds is None:
            return None
        kind = load(self.kinds.at[jnp.minimum(t, self.length - 1)])
        return jnp.where(t < self.length, kind, PADDING)

    def gate(self, t: Array, kind: Array | None) -> Array:
        """Return a_t: the gate, 1 at padding and outside, 0 at a reset."""
        gate = jnp.exp2(LOG2_E * self.load(self.log_decay, t))
        if kind is None:
            return gate
        return jnp.where(kind == DECAY, gate, (kind == PADDING).astype(jnp.float32))


def silent(value: Array, kind: Array | None) -> Array:
    """Return the value of a token, 0 at padding."""
    return value if kind is None else jnp.where(kind == PADDING, 0.0, value)


def specs(layout: Layout, length: int) -> dict[str, Any]:
    """Return the block of each kind of array in the grid (channel blocks, splits, batch)."""
    block = layout.block
    return {
        "tokens": pl.BlockSpec((None, length, block), lambda k, s, b: (b, 0, k)),
        "state": pl.BlockSpec((None, block), lambda k, s, b: (b, k)),
        "splits": pl.BlockSpec((None, layout.splits, block), lambda k, s, b: (b, 0, k)),
        "split": pl.BlockSpec((None, None, block), lambda k, s, b: (b, s, k)),
        "kinds": pl.BlockSpec((None, length), lambda k, s, b: (b, 0)),
    }


def split_sums(
    x: Array,
    log_decay: Array,
    kinds: tuple[Array, ...],
    layout: Layout,
    config: GatedScanConfig,
    *,
    reverse: bool,
    interpret: bool,
) -> tuple[Array, Array]:
    """Run each split from zero, forwards or (for cotangents x) backwards in time.

    Grid, loop and carry as in the forward kernel; reads x and the gates once.

    Returns:
      The product of the gates of each split, and what it hands on: h after its last token, or
      a s of its first one. Both [B, splits, D], float32.
    """
    batch, length, width = x.shape
    where = specs(layout, length)
    out = jax.ShapeDtypeStruct((batch, layout.splits, width), jnp.float32)
    kernel = functools.partial(
        _split_kernel, length=length, width=width, layout=layout, rows=config.rows, reverse=reverse
    )
    return launch(
        kernel,
        name=f"{'gated_handed' if reverse else 'gated_ends'}{'_packed' if kinds else ''}",
        grid=(layout.blocks, layout.splits, batch),
        in_specs=[where["tokens"], where["tokens"], *([where["kinds"]] * len(kinds))],
        out_specs=[where["split"], where["split"]],
        out_shape=[out, out],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, log_decay, *kinds)


def _split_kernel(
    x_ref: Any,
    log_decay_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    rows: int,
    reverse: bool,
) -> None:
    *kinds, product_ref, out_ref = refs
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(1) * layout.span
    tokens = Tokens(length, columns, log_decay_ref, kinds[0] if kinds else None)
    number = layout.span // rows

    def block(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        product, out = carry
        start = first + (number - 1 - n if reverse else n) * rows
        loaded = []
        for i in reversed(range(rows)) if reverse else range(rows):
            kind = tokens.kind(start + i)
            x = silent(tokens.load(x_ref, start + i), kind)
            loaded.append((x, tokens.gate(start + i, kind)))
        for x, a in loaded:
            product = product * a
            out = a * (out + x) if reverse else a * out + x
        return product, out

    zero = jnp.zeros((layout.block,), jnp.float32)
    product, out = jax.lax.fori_loop(0, number, block, (zero + 1.0, zero))
    store(product_ref, product, columns)
    store(out_ref, out, columns)


def incoming(
    product_ref: Any, out_ref: Any, state: Array, columns: Array, splits: int, *, reverse: bool
) -> Array:
    """Lead a state through the splits before this one (after it, in reverse)."""
    split = pl.program_id(1)
    together = min(_UNROLL, splits)

    def block(n: Array, carry: Array) -> Array:
        loaded = []
        for turn in (n * together + i for i in range(together)):
            other = jnp.clip(splits - 1 - turn if reverse else turn, 0, splits - 1)
            passed = (turn < splits) & (other > split if reverse else other < split)
            product = load(product_ref.at[other, :], columns & passed, 1.0)
            loaded.append((product, load(out_ref.at[other, :], columns & passed)))
        for product, out in loaded:
            carry = product * carry + out
        return carry

    return jax.lax.fori_loop(0, -(-splits // together), block, state)
