"""The attention kernels, interpreted, against formulas in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported
from jaxmem.ops.attention import Dropout, Places, attention
from pallas_kernels._compat import make_mesh
from pallas_kernels.pairs import PairTiles
from tests.helpers.attention import (
    Size,
    check,
    direct,
    factors,
    inputs,
    rows_visible,
    run,
    with_whole_dots,
)
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close

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
ON_KERNELS = {"implementation": "pallas", "config": TILES}
HALF_GRADIENT = Budget(rtol=5e-2, atol=5e-2, rms=2e-2)
HALVES = {
    jnp.bfloat16: (BFLOAT16, HALF_GRADIENT),
    jnp.float16: (Budget(1e-2, 1e-2, 2e-3), Budget(1e-2, 1e-2, 2e-3)),
}
"""Budgets of outputs and gradients."""


# Lengths: one, one less than a tile, a tile, one more, several and some.
@pytest.mark.parametrize(
    ("size", "rule"),
    [
        (Size(length=1), {}),
        (Size(length=1), {"lag": 1}),  # nobody sees anything
        (Size(length=15, width=40, value_width=80), {"lag": 1}),
        (Size(length=16), {"window": 5}),
        (Size(length=17, heads=4, groups=2, width=80, value_width=24), {"lag": 2}),
        (Size(length=18, width=17, value_width=13), {}),  # no width is a multiple of anything
        (Size(length=53, batch=1), {}),
        (Size(length=53, batch=1), {"lag": 1, "window": 19}),
        (Size(length=53, batch=1, heads=1, groups=1), {"lag": 20, "window": 40}),
    ],
    ids=str,
)
def test_rows(size: Size, rule: dict[str, Any]):
    args = inputs(size)
    check(run(args, **rule, **ON_KERNELS), direct(args, rows_visible(size, **rule)))


def test_default_tiles():
    """The shipped tiles of wide heads; the last one overhangs the row."""
    size = Size(length=37, batch=1, width=128, value_width=128)
    args = inputs(size)
    args = args._replace(scale=args.scale / 8)  # logits of order 1, as of narrow heads
    found = run(args, lag=1, implementation="pallas")
    check(found, direct(args, rows_visible(size, lag=1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [192, 256])
def test_default_tiles_of_the_widest_heads(width: int, dtype: Any):
    size = Size(length=19, batch=1, heads=1, groups=1, width=width, value_width=width)
    args = inputs(size, dtypes=(dtype, dtype))
    args = args._replace(scale=args.scale / 8)
    found = run(args, implementation="pallas")
    check(found, direct(args, rows_visible(size)), *HALVES[dtype])


@pytest.mark.parametrize("width", [192, 256])
def test_wide_heads_in_float32(width: int):
    """No table has tiles for them, for they fill shared memory; these are small enough."""
    size = Size(length=19, batch=1, heads=1, groups=1, width=width, value_width=width)
    args = inputs(size)
    args = args._replace(scale=args.scale / 8)
    check(run(args, **ON_KERNELS), direct(args, rows_visible(size)))


def test_tiles_that_are_not_square():
    size, rule = Size(length=53, batch=1), {"lag": 1, "window": 37}
    tiles = PairTiles(
        block_q=32,
        block_k=16,
        num_warps=4,
        num_stages=2,
        backward_q=16,
        backward_k=32,
        backward_warps=4,
        backward_stages=2,
    )
    args = inputs(size)
    found = run(args, **rule, implementation="pallas", config=tiles)
    check(found, direct(args, rows_visible(size, **rule)))


def test_everything_at_once():
    """Documents that end before, at and after the edge of a tile, and padding between them."""
    size = Size(length=53, heads=4, groups=2, width=40, value_width=24)
    segments = [[1] * 15 + [2] * 17 + [0] * 2 + [3] * 19, [0] * 3 + [7] * 13 + [4] * 17 + [5] * 20]
    rule = {"lag": 1, "window": 12}
    dropout = Dropout(0.3, jax.random.key(5))
    args = inputs(size, gated=True)
    options = {"segment_ids": jnp.asarray(segments), "dropout": dropout, **rule}
    visible = rows_visible(size, segments=segments, **rule)
    check(run(args, **options, **ON_KERNELS), direct(args, visible, factors(size, dropout)))


def test_cache():
    """Three queries over 37 slots: rows at different lengths, two documents, unused slots."""
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
    places = Places(*map(jnp.asarray, (query, key, query_segment, key_segment)))
    args = inputs(size)
    check(run(args, lag=1, places=places, **ON_KERNELS), direct(args, visible))


def test_extreme_gates():
    """Gates that let nothing through, or everything, for whole tiles and single tokens."""
    size = Size(length=37, batch=1)
    args = inputs(size, gated=True)
    gates = np.asarray(args.log_forget).copy()
    gates[:, 5] = gates[:, 16] = -1e4
    gates[:, 20:] = 0.0
    args = args._replace(log_forget=jnp.asarray(gates))
    check(run(args, **ON_KERNELS), direct(args, rows_visible(size)))


def test_gradients_of_gates_that_forget_nearly_all():
    """They are e^-12 of what a token gives itself, whose rounding must not be among them."""
    size = Size(length=53)
    args = inputs(size)
    gates = -12.0 - jax.random.uniform(jax.random.key(6), (size.batch, size.length, size.heads))
    args = args._replace(scale=0.05 * args.scale, log_forget=gates)
    found, expected = run(args, **ON_KERNELS), direct(args, rows_visible(size))
    assert np.max(np.abs(expected[1].log_forget)) < 1e-4
    check(found, expected)


@pytest.mark.parametrize("length", [65, 300])
def test_gates_that_grow(length: int):
    """Older keys gain up to e^0.3 a token, so that they outweigh near ones by e^45 in the end."""
    size = Size(batch=1, length=length)
    args = inputs(size)
    gates = 0.3 * jax.random.uniform(jax.random.key(6), (1, length, size.heads))
    args = args._replace(log_forget=gates)
    # A gate's gradient adds up what passes it, here nearly all of later rows, and their rounding.
    # Measured rms 1.2e-5 with 300 tokens on JAX 0.12, else below 8e-6.
    budget = GRADIENT._replace(rms=1.5e-5) if length == 300 else GRADIENT
    check(run(args, **ON_KERNELS), direct(args, rows_visible(size)), gradient=budget)


def test_clamp_and_value_gates_among_all_else():
    """As `test_everything_at_once`; a quarter of the logits exceed the clamp."""
    size = Size(length=53, heads=4, groups=2, width=24, value_width=16)
    segments = [[1] * 15 + [2] * 17 + [0] * 2 + [3] * 19, [0] * 3 + [7] * 13 + [4] * 17 + [5] * 20]
    rule = {"lag": 1, "window": 12}
    dropout = Dropout(0.3, jax.random.key(5))
    args = inputs(size, gated=True, value_gated=True)
    options = {"segment_ids": jnp.asarray(segments), "dropout": dropout, "clamp": 2.0, **rule}
    visible = rows_visible(size, segments=segments, **rule)
    expected = direct(args, visible, factors(size, dropout), clamp=2.0)
    check(run(args, **options, **ON_KERNELS), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_a_clamp_alone(gated: bool):
    """With gates, their gradient is that of logits that the clamp does not stop."""
    size = Size(length=37, batch=1)
    args = inputs(size, gated=gated)
    expected = direct(args, rows_visible(size), clamp=0.7)
    check(run(args, clamp=0.7, **ON_KERNELS), expected)


def test_value_gates_alone():
    size = Size(length=37, batch=1, heads=4, groups=2)
    args = inputs(size, value_gated=True)
    found = run(args, lag=1, **ON_KERNELS)
    check(found, direct(args, rows_visible(size, lag=1)))
    np.testing.assert_array_equal(found[1].value_gate[:, -1], 0.0)  # nobody sees the last key


@pytest.mark.parametrize(("scale", "clamp"), [(5 / 16, 3 * 5 / 16), (64.0, 5.0)])
def test_logits_at_the_clamp_and_far_beyond(scale: float, clamp: float):
    """Logits that equal the clamp pass their gradient; they may reach 1e3."""
    size = Size(length=18, batch=1, heads=2, groups=1)
    args = with_whole_dots(inputs(size, value_gated=True), scale)
    found = run(args, lag=1, clamp=clamp, **ON_KERNELS)
    check(found, direct(args, rows_visible(size, lag=1), clamp=clamp))


@pytest.mark.parametrize(
    "dtypes",
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16), (jnp.float16, jnp.float16)],
    ids=["bfloat16", "float32-keys", "float16"],
)
def test_dtypes(dtypes: Any):
    size = Size(length=21, batch=1)
    args = inputs(size, dtypes=dtypes)
    outputs, grads = run(args, lag=1, **ON_KERNELS)
    assert (outputs.y.dtype, outputs.lse.dtype) == (dtypes[1], jnp.float32)
    assert [g.dtype for g in grads[:3]] == [dtypes[0], dtypes[0], dtypes[1]]
    check((outputs, grads), direct(args, rows_visible(size, lag=1)), *HALVES[dtypes[1]])


def test_transformations():
    """Under vmap, checkpoint, scan and shard_map the kernels compute what they do alone."""
    size = Size(batch=2, length=5, heads=1, groups=1)
    q, k, v, scale, *_ = inputs(size)

    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, scale=scale, lag=1, **ON_KERNELS)

    def loss(function: Any) -> Any:
        return jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=(0, 1, 2))

    def by_rows(*args: jax.Array) -> jax.Array:
        return jax.vmap(read)(*(a[:, None] for a in args))[:, 0]

    def scanned(*args: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda _, a: (None, read(*a)), None, [a[:, None] for a in args])[1][
            :, 0
        ]

    mesh = make_mesh((2,), ("data",), jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(read, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    forms = {
        "plain": read,
        "checkpoint": jax.checkpoint(read),
        "vmap": by_rows,
        "scan": scanned,
        "shard_map": sharded,
    }
    found = jax.jit(lambda *a: {n: (f(*a), loss(f)(*a)) for n, f in forms.items()})(q, k, v)
    plain = found.pop("plain")
    for name, other in found.items():
        assert_close(other, plain, FORWARD)
        assert name in forms


def test_second_derivatives_are_refused():
    q, k, v, scale, *_ = inputs(Size(length=3))

    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, scale=scale, **ON_KERNELS))

    with pytest.raises(KernelUnsupported, match=r"attention .*first derivatives.*'xla'"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q)))(q)
