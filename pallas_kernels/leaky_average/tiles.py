"""What the forward and the backward kernels share: time, decays, products, sums of a split."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision, launch, load, mm, pl, store
from pallas_kernels._tiles import LOG2_E
from pallas_kernels.leaky_average.launch import Layout, LeakyAverageConfig

REAL, COUNTED = 1, 2
"""Bits of a token's flags: it is no padding; the token after it decays."""


class Clock(NamedTuple):
    """Time of packed rows: it stands still at padding, and a reset forgets what was before.

    All [B, T]; token -1 has tick 0 and epoch 0.
    """

    ticks: Array
    """Real tokens up to and including this one."""
    epoch: Array
    """Resets up to and including this token."""
    valid: Array
    """Real tokens, bool."""


class Inputs(NamedTuple):
    """Operands of the op and of its forward kernel."""

    x: Array
    """Inputs [B, T, H, K], any T and K."""
    rate: Array
    """Decay rates [H], float32, >= 0 and finite."""
    start: Array
    """Sums before the first token [B, H, K], float32."""
    clock: Clock | None = None
    """Time of packed rows; None: every token is a tick."""


class GradInputs(NamedTuple):
    """Operands of the backward kernel."""

    dsums: Array
    """Cotangent of the sums [B, T, H, K]; what stands at padding is ignored."""
    dfinal: Array
    """Cotangent of the final sums [B, H, K], float32."""
    sums: Array
    """What the forward kernel returned."""
    rate: Array
    clock: Clock | None = None


def as_operands(clock: Clock | None) -> tuple[Array, ...]:
    """Return the arrays that a kernel over packed rows takes: ticks, epochs, flags."""
    if clock is None:
        return ()
    following = (clock.ticks[:, 1:] > clock.ticks[:, :-1]) & (
        clock.epoch[:, 1:] == clock.epoch[:, :-1]
    )
    counted = jnp.pad(following, ((0, 0), (0, 1)))
    flags = REAL * clock.valid.astype(jnp.int32) + COUNTED * counted.astype(jnp.int32)
    return clock.ticks.astype(jnp.int32), clock.epoch.astype(jnp.int32), flags


class Times(NamedTuple):
    """Time inside a kernel; without references every token is a tick of the same epoch."""

    length: int
    refs: tuple[Any, ...]

    def at(self, rows: Any) -> tuple[Array, Array]:
        """Return tick and epoch of tokens; -1 is before the first, and the last one lasts."""
        if not self.refs:
            rows = jnp.minimum(rows, self.length - 1)
            return rows + 1, jnp.zeros_like(rows)
        inside = jnp.clip(rows, 0, self.length - 1)
        tick, epoch = (jnp.where(rows < 0, 0, load(ref.at[inside])) for ref in self.refs[:2])
        return tick, epoch

    def flag(self, rows: Array, bit: int) -> Array:
        """Return whether tokens are inside and have a flag."""
        if not self.refs:
            return rows < (self.length if bit == REAL else self.length - 1)
        inside = jnp.minimum(rows, self.length - 1)
        return (rows < self.length) & ((load(self.refs[2].at[inside]) & bit) > 0)


def decay_between(log2_decay: Array, later: tuple, earlier: tuple) -> Array:
    """Return the decay from one moment to another, 0 across a reset.

    Only differences of time enter the exponent, so nothing overflows however large the rate is.
    """
    steps = jnp.maximum(later[0] - earlier[0], 0).astype(jnp.float32)
    return jnp.where(later[1] == earlier[1], jnp.exp2(log2_decay * steps), 0.0)


def column(moment: tuple) -> tuple:
    """Return ticks and epochs as [C, 1]."""
    return tuple(part[:, None] for part in moment)


def row(moment: tuple) -> tuple:
    """Return ticks and epochs as [1, C]."""
    return tuple(part[None, :] for part in moment)


def product(matrix: Array, x: Array, *, precision: Precision, interpret: bool) -> Array:
    """Multiply float32 decays with a tile of inputs, accumulated in float32.

    Half-precision inputs meet the decays as the sum of two half-precision numbers, which keeps 16
    bits of them (22 in float16); `default` drops the second one.
    """
    if x.dtype == jnp.float32:
        return mm(matrix, x, precision=precision, interpret=interpret)
    high = matrix.astype(x.dtype)
    out = mm(high, x, interpret=interpret)
    if precision != "default":
        low = (matrix - high.astype(jnp.float32)).astype(x.dtype)
        out += mm(low, x, interpret=interpret)
    return out


def pick(tile: Array, chosen: Array) -> Array:
    """Return the row of a tile [C, P] where [C] `chosen` holds; values cannot be sliced."""
    return jnp.sum(jnp.where(chosen[:, None], tile, 0.0), axis=0)


def load_tokens(ref: Any, at: Array, rows: Array, times: Times, columns: Array) -> Array:
    """Load a chunk [C, P], zero at padding and outside.

    Padding is not part of the load's mask: a mask that waits for another load cannot be fetched
    ahead of time.
    """
    chunk = ref.at[pl.ds(at, rows.size), :]
    x = load(chunk, (rows < times.length)[:, None] & columns[None, :])
    return jnp.where(times.flag(rows, REAL)[:, None], x, jnp.zeros_like(x)) if times.refs else x


def specs(layout: Layout, length: int, *, packed: bool) -> dict[str, Any]:
    """Return the block of each kind of array in the grid (channel blocks, heads, splits, batch)."""
    block = layout.block
    return {
        "tokens": pl.BlockSpec((None, length, None, block), lambda k, h, s, b: (b, 0, h, k)),
        "rate": pl.BlockSpec((None,), lambda k, h, s, b: (h,)),
        "state": pl.BlockSpec((None, None, block), lambda k, h, s, b: (b, h, k)),
        "splits": pl.BlockSpec((None, layout.ends, None, block), lambda k, h, s, b: (b, 0, h, k)),
        "split": pl.BlockSpec((None, None, None, block), lambda k, h, s, b: (b, s, h, k)),
        "clock": [pl.BlockSpec((None, length), lambda k, h, s, b: (b, 0))] * (3 if packed else 0),
    }


def split_sums(
    x: Array,
    rate: Array,
    clock: tuple[Array, ...],
    layout: Layout,
    config: LeakyAverageConfig,
    *,
    reverse: bool,
    interpret: bool,
) -> Array:
    """Sum each split on its own, as if nothing came before it (after it, in reverse).

    Forward: Σ_j λ^(tick of the split's end - tick_j) x_j; in reverse: Σ_j λ^(tick_j - tick before
    the split) x_j. Grid (channel blocks, heads, splits, batch); a program reads its tokens once,
    in no product, sums in float32 and needs no shared memory of its own.

    Returns:
      [B, ends, H, K] float32, of which the rows from `splits` on are not written.
    """
    batch, length, heads, width = x.shape
    where = specs(layout, length, packed=bool(clock))
    kernel = functools.partial(
        _split_kernel,
        length=length,
        width=width,
        layout=layout,
        chunk=config.chunk,
        reverse=reverse,
    )
    return launch(
        kernel,
        name=f"{'leaky_handed' if reverse else 'leaky_ends'}{'_packed' if clock else ''}",
        grid=(layout.blocks, heads, layout.splits, batch),
        in_specs=[where["tokens"], where["rate"], *where["clock"]],
        out_specs=where["split"],
        out_shape=jax.ShapeDtypeStruct((batch, layout.ends, heads, width), jnp.float32),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, rate, *clock)


def _split_kernel(
    x_ref: Any,
    rate_ref: Any,
    *refs: Any,
    length: int,
    width: int,
    layout: Layout,
    chunk: int,
    reverse: bool,
) -> None:
    *clock, out_ref = refs
    times = Times(length, tuple(clock))
    columns = pl.program_id(0) * layout.block + jnp.arange(layout.block) < width
    first = pl.program_id(2) * layout.span
    log2_decay = -LOG2_E * load(rate_ref)

    def step(n: Array, carry: Array) -> Array:
        at = first + (layout.span // chunk - 1 - n if reverse else n) * chunk
        rows = at + jnp.arange(chunk)
        before, now, last = times.at(at - 1), times.at(rows), times.at(at + chunk - 1)
        x = load_tokens(x_ref, at, rows, times, columns).astype(jnp.float32)
        weights = (
            decay_between(log2_decay, now, before)
            if reverse
            else decay_between(log2_decay, last, now)
        )
        return decay_between(log2_decay, last, before) * carry + jnp.sum(
            weights[:, None] * x, axis=0
        )

    zero = jnp.zeros((layout.block,), jnp.float32)
    store(out_ref, jax.lax.fori_loop(0, layout.span // chunk, step, zero), columns)
