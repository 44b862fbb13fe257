"""The attention kernels, interpreted, against formulas in float64.

Every pair of what a call may have occurs in one of these calls, and of lengths, lags and windows
beside tiles all that differ: less than a tile, a tile, one token more, several tiles and some
tokens. Scales, windows and forget gates of any size are in test_parity_attention_extremes.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmem.errors import KernelUnsupported
from jaxmem.ops.attention import Dropout, Places, attention
from pallas_kernels._compat import make_mesh
from pallas_kernels.pairs import PairTiles
from tests.helpers.attention import (
    TILES,
    Inputs,
    Outputs,
    Size,
    check,
    direct,
    factors,
    inputs,
    read,
    rows_visible,
    run,
    value_and_grads,
    with_whole_dots,
)
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget

OBLONG = PairTiles(
    block_q=32,
    block_k=16,
    num_warps=4,
    num_stages=2,
    backward_q=16,
    backward_k=32,
    backward_warps=4,
    backward_stages=2,
)
HALF_GRADIENT = Budget(rtol=5e-2, atol=5e-2, rms=2e-2)
BUDGETS = {
    jnp.float32: (FORWARD, GRADIENT),
    jnp.bfloat16: (BFLOAT16, HALF_GRADIENT),
    jnp.float16: (Budget(1e-2, 1e-2, 2e-3), Budget(1e-2, 1e-2, 2e-3)),
}
"""Budgets of outputs and gradients by the dtype of the values."""


class Row(NamedTuple):
    """A call with rows of tokens."""

    size: Size
    rule: dict[str, Any]
    gated: bool = False
    value_gated: bool = False
    clamp: float = np.inf
    rate: float = 0.0
    segments: Any = None
    dtypes: Any = (jnp.float32, jnp.float32)
    tiles: PairTiles | None = TILES
    """None: those of the table."""


FLOAT32_KEYS = (jnp.float32, jnp.bfloat16)
BFLOAT16S, FLOAT16S = (jnp.bfloat16,) * 2, (jnp.float16,) * 2
# Documents that end before, at and after the edge of a tile, and padding between them.
SEGMENTS = [[1] * 15 + [2] * 17 + [0] * 2 + [3] * 19, [0] * 3 + [7] * 13 + [4] * 17 + [5] * 20]
LONG = {"length": 53, "batch": 1}
WIDEST = {"length": 19, "batch": 1, "heads": 1, "groups": 1}
ROWS = {
    "less than a tile": Row(
        Size(length=15, width=40, value_width=80), {"lag": 1}, dtypes=BFLOAT16S
    ),
    "a tile": Row(Size(length=16), {"window": 5}, dtypes=FLOAT32_KEYS),
    "shared keys": Row(Size(heads=4, groups=2, **LONG), {"lag": 1, "window": 19}, rate=0.3),
    "far keys": Row(
        Size(heads=1, groups=1, **LONG), {"lag": 20, "window": 40}, gated=True, clamp=0.7
    ),
    "oblong tiles": Row(
        Size(heads=1, groups=1, width=192, value_width=192, **LONG),
        {"lag": 1, "window": 37},
        value_gated=True,
        tiles=OBLONG,
    ),
    # No width is a multiple of anything.
    "packed": Row(
        Size(length=53, width=17, value_width=13), {}, gated=True, rate=0.3, segments=SEGMENTS
    ),
    # A quarter of the logits exceed the clamp.
    "everything": Row(
        Size(length=53, heads=4, groups=2, width=24, value_width=16),
        {"lag": 1, "window": 12},
        gated=True,
        value_gated=True,
        clamp=2.0,
        rate=0.3,
        segments=SEGMENTS,
    ),
    # The last tile of the table overhangs the row.
    "table": Row(Size(length=37, batch=1, width=128, value_width=128), {"lag": 1}, tiles=None),
    "table, bfloat16": Row(
        Size(width=192, value_width=192, **WIDEST), {}, dtypes=BFLOAT16S, tiles=None
    ),
    "table, float16": Row(
        Size(width=256, value_width=256, **WIDEST), {}, dtypes=FLOAT16S, tiles=None
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str):
    size, rule, gated, value_gated, clamp, rate, segments, dtypes, tiles = ROWS[name]
    args = inputs(size, gated=gated, value_gated=value_gated, dtypes=dtypes)
    if size.width >= 128:
        args = args._replace(scale=args.scale / 8)  # logits of order 1, as of narrow heads
    options: dict[str, Any] = {**rule, "config": tiles}
    if clamp < np.inf:
        options["clamp"] = clamp
    if segments is not None:
        options["segment_ids"] = np.array(segments)
    factor: Any = 1.0
    if rate > 0.0:
        options["dropout"] = Dropout(rate, jax.random.key(5))
        factor = factors(size, options["dropout"])
    outputs, grads = run(args, "pallas", **options)
    assert (outputs.y.dtype, outputs.lse.dtype) == (dtypes[1], jnp.float32)
    assert [g.dtype for g in grads[:3]] == [dtypes[0], *dtypes]
    visible = rows_visible(size, segments=segments, **rule)
    check((outputs, grads), direct(args, visible, factor, clamp), *BUDGETS[dtypes[1]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [192, 256])
def test_the_table_has_tiles_for_the_widest_heads(width: int, dtype: Any):
    """Two of these four run above."""
    x = jax.ShapeDtypeStruct((1, 19, 1, width), dtype)
    y = jax.eval_shape(lambda *arrays: attention(*arrays, implementation="pallas"), x, x, x)
    assert (y.shape, y.dtype) == (x.shape, dtype)


def test_cache():
    """Three queries over 37 slots: rows at different lengths, two documents, unused slots.

    The window is wider than all places are apart.
    """
    size = Size(batch=3, length=3, keys=37, heads=2, groups=1)
    key = np.tile(np.arange(37), (3, 1))
    key_segment = np.array([[1] * 18 + [2] * 15 + [0] * 4, [1] * 37, [0] * 37])
    query = np.array([[20, 31, 32], [5, 35, 36], [0, 1, 2]])
    query_segment = np.array([[2, 1, 2], [1, 0, 1], [1, 1, 1]])
    visible = (
        (key[:, None] + 1 <= query[:, :, None])
        & (key_segment[:, None] == query_segment[:, :, None])
        & (key_segment[:, None] != 0)
    )
    places = Places(50 * query, 50 * key, query_segment, key_segment)
    args = inputs(size)
    check(run(args, "pallas", lag=1, window=3000, places=places), direct(args, visible))


@pytest.mark.parametrize("scale", [5 / 16, 64.0], ids=["at", "beyond"])
def test_logits_at_the_clamp_and_far_beyond(scale: float):
    """Logits that equal the clamp pass their gradient; they may reach 1e3."""
    size = Size(length=17, batch=1, heads=4, groups=2, width=80, value_width=24)
    clamp, dropout = 3 * 5 / 16, Dropout(0.3, jax.random.key(5))
    args = inputs(size, value_gated=True)
    # Whole queries and keys of which few numbers are not 0, lest their products be large.
    few = (np.arange(size.width) % 8 == 0).astype(np.float32)
    args = with_whole_dots(args._replace(q=args.q * few, k=args.k * few), scale)
    found = run(args, "pallas", lag=2, clamp=clamp, dropout=dropout)
    visible = rows_visible(size, lag=2)
    logits = scale * np.einsum("bthk,bshk->bhts", args.q, np.repeat(args.k, 2, axis=2))
    assert np.any(visible[:, None] & (logits == clamp)) == (clamp % scale == 0.0)
    check(found, direct(args, visible, factors(size, dropout), clamp))
    np.testing.assert_array_equal(found[1].value_gate[:, -2:], 0.0)  # nobody sees these keys


def test_transformations():
    """Kernels compute the same within shard_map, scan, checkpoint and vmap, one in the other."""
    size = Size(batch=8, length=18, heads=1, groups=1)
    args = inputs(size, value_gated=True)

    def spread(args: Inputs) -> Outputs:
        q, k, v, scale, _, gate = args

        def call(q: Any, k: Any, v: Any, gate: Any) -> Outputs:
            rows = Inputs(q[None], k[None], v[None], scale, None, gate[None])
            options = {"implementation": "pallas", "config": TILES}
            return jax.tree.map(lambda a: a[0], read(rows, {}, lag=1, **options))

        def scanned(*arrays: Any) -> Outputs:
            pairs = [a.reshape(2, 2, *a.shape[1:]) for a in arrays]
            mapped = jax.checkpoint(jax.vmap(call))
            _, outputs = jax.lax.scan(lambda _, pair: (None, mapped(*pair)), None, pairs)
            return jax.tree.map(lambda a: a.reshape(4, *a.shape[2:]), outputs)

        mesh = make_mesh((2,), ("data",), jax.devices()[:2])
        rows = PartitionSpec("data")
        sharded = jax.shard_map(scanned, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return sharded(q, k, v, gate)

    found = jax.jit(value_and_grads(spread))(args, 1.0)
    check(found, direct(args, rows_visible(size, lag=1)))


def test_second_derivatives_are_refused():
    x = jax.ShapeDtypeStruct((2, 3, 2, 16), jnp.float32)

    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, q, q, implementation="pallas", config=TILES))

    with pytest.raises(KernelUnsupported, match=r"attention .*first derivatives.*'xla'"):
        jax.eval_shape(jax.grad(lambda q: jnp.sum(jax.grad(loss)(q))), x)
