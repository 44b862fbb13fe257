"""The kernels of squared attention, interpreted, against formulas in float64."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import lower_for_cuda, stand_in_gpu
from pallas_kernels._launch import Entry, entries
from pallas_kernels._lock import launches
from pallas_kernels.pairs import Decay, PairTiles
from pallas_kernels.squared_attention import (
    KERNEL,
    Operands,
    Outputs,
    find_config,
    squared_backward,
    squared_forward,
    unmet,
)
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.lowering import locked_names

TABLE = entries(KERNEL.name)
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


BUDGETS = {
    jnp.bfloat16: (BFLOAT16, Budget(rtol=5e-2, atol=5e-2, rms=2e-2)),
    jnp.float16: (Budget(1e-2, 1e-2, 2e-3), Budget(1e-2, 1e-2, 2e-3)),
}
"""Of outputs and gradients."""


class Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any
    decay: Decay | None
    document: Any
    dy: Any
    dtotal: Any


class Results(NamedTuple):
    y: Any
    total: Any
    dq: Any
    dk: Any
    dv: Any
    at_queries: Any
    at_keys: Any


class Size(NamedTuple):
    batch: int = 2
    tokens: int = 17
    heads: int = 2
    width: int = 16
    value_width: int = 16


def words(log_decay: np.ndarray) -> Decay:
    """Sum [B T H] and return two float32 words, the first multiples of 1/16, by head."""
    sums = np.moveaxis(np.cumsum(log_decay.astype(np.float64), axis=1), 1, 2)
    whole = np.round(sums * 16) / 16
    parts = [np.float32(a) for a in (whole, sums - whole)]
    return Decay(*parts, *parts)


def inputs(
    size: Size, *, decay: float | None = -1.0, document: Any = None, dtype: Any = jnp.float32
) -> Inputs:
    """Draw inputs; the log decays are uniform between 0 and `decay`."""
    draw = np.random.default_rng(0)
    lead = (size.batch, size.tokens, size.heads)
    q, k, v, dy = (
        draw.normal(size=(*lead, n))
        for n in (size.width, size.width, size.value_width, size.value_width)
    )
    log_decay = draw.uniform(size=lead)
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    return Inputs(
        q,
        k,
        v,
        None if decay is None else words(decay * log_decay),
        None if document is None else np.asarray(document, np.int32),
        dy.astype(np.float32 if dtype == np.float16 else dtype),
        np.float32(draw.normal(size=lead)),
    )


def direct(args: Inputs, scale: float) -> Results:
    q, k, v, dy, dtotal = (
        np.asarray(a, np.float64) for a in (args.q, args.k, args.v, args.dy, args.dtotal)
    )
    seen = np.tril(np.ones((q.shape[1],) * 2, bool))[None, None]
    if args.document is not None:
        names = np.asarray(args.document)
        seen = seen & (names[:, :, None] == names[:, None, :])[:, None]
    exponents = np.zeros((1, 1, 1, 1))
    if args.decay is not None:
        query, query_rest, key, key_rest = (np.asarray(a, np.float64) for a in args.decay)
        exponents = (query + query_rest)[..., None] - (key + key_rest)[..., None, :]
    fade = np.exp(np.where(seen, exponents, -np.inf))
    s = scale * np.einsum("bthk,bshk->bhts", q, k)
    p = s**2 * fade
    dp = np.einsum("bthv,bshv->bhts", dy, v) + np.moveaxis(dtotal, 1, 2)[..., None]
    ds = 2 * s * fade * dp
    return Results(
        np.einsum("bhts,bshv->bthv", p, v),
        np.moveaxis(p.sum(3), 1, 2),
        scale * np.einsum("bhts,bshk->bthk", ds, k),
        scale * np.einsum("bhts,bthk->bshk", ds, q),
        np.einsum("bhts,bthv->bshv", p, dy),
        None if args.decay is None else (p * dp).sum(3),
        None if args.decay is None else -(p * dp).sum(2),
    )


@functools.cache
def both_passes(**options: Any) -> Any:
    def both(args: Inputs) -> Results:
        operands, grads = Operands(*args[:5]), Outputs(*args[5:])
        *gradients, decay = squared_backward(operands, grads, **options)
        at = (None, None) if decay is None else (decay.query, decay.key)
        return Results(*squared_forward(operands, **options), *gradients, *at)

    return jax.jit(both)


def run(args: Inputs, scale: float = 0.25, config: PairTiles | None = TILES) -> Any:
    found = both_passes(scale=scale, config=config, interpret=True)(args)
    return jax.tree.map(np.asarray, found)


def check(
    args: Inputs,
    forward: Budget = FORWARD,
    gradient: Budget = GRADIENT,
    config: PairTiles | None = TILES,
) -> Results:
    scale = args.q.shape[-1] ** -0.5
    found, wanted = run(args, scale, config), direct(args, scale)
    assert_close(found[:2], wanted[:2], forward)
    assert_close(found[2:], wanted[2:], gradient)
    return found


# Lengths: one, one less than a tile, a tile, one more, several and some.
@pytest.mark.parametrize(
    ("size", "decay"),
    [
        (Size(tokens=1), -1.0),
        (Size(tokens=15, width=40, value_width=80), -1.0),
        (Size(tokens=16, heads=1), None),
        (Size(tokens=17, heads=3, width=17, value_width=13), None),  # multiples of nothing
        (Size(tokens=53, batch=1, width=1, value_width=1), -0.1),
    ],
    ids=str,
)
def test_rows(size: Size, decay: float | None):
    check(inputs(size, decay=decay))


@pytest.mark.parametrize("decay", [None, -0.3], ids=str)
def test_tiles_that_are_not_square(decay: float | None):
    """Whole tiles, diagonal ones and one that overhangs the row."""
    documents = None if decay is None else [[0] * 85, [3] * 40 + [4] * 45]
    size = Size(tokens=85, heads=1)
    check(inputs(size, decay=decay, document=documents), config=OBLONG)


def test_documents():
    """Documents that end before, at and after the edge of a tile, and many in one tile."""
    documents = [
        [0] * 15 + [1] * 17 + [2] * 37,
        [5] * 16 + [6] * 48 + [7] * 5,
        list(range(69)),
    ]
    size = Size(batch=3, tokens=69, heads=1, width=40, value_width=24)
    check(inputs(size, decay=-0.2, document=documents))


STEPS = {
    "fast": np.full(37, -50.0),
    # Exponents of pairs that do not see each other are infinite.
    "instant": np.where(np.arange(37) % 7 == 0, -1e4, 0.0),
    "growth": np.full(37, 0.5),
}


@pytest.mark.parametrize("steps", STEPS)
def test_extreme_decay(steps: str):
    """Weights of later tokens vanish in an early tile, or grow to e^18."""
    log_decay = np.broadcast_to(STEPS[steps][None, :, None], (1, 37, 2))
    args = inputs(Size(batch=1, tokens=37))
    found = check(args._replace(decay=words(log_decay)))
    assert all(np.all(np.isfinite(a)) for a in found)


@pytest.mark.parametrize("dtype", [np.float32, *BUDGETS], ids=jnp.dtype)
def test_large_scores(dtype: Any):
    """|s| about 1e3: weights of 1e6, which float16 does not hold."""
    args = inputs(Size(batch=1, tokens=37), dtype=dtype)
    small = np.array(1e-3, args.dy.dtype)
    args = args._replace(
        q=args.q * np.array(256, dtype), dy=small * args.dy, dtotal=np.float32(1e-3) * args.dtotal
    )
    found = check(args, *BUDGETS.get(dtype, (FORWARD, GRADIENT)))
    assert np.max(found.total) > 1e6
    out = np.float32 if dtype == np.float16 else dtype
    assert [a.dtype for a in found[:5]] == [out, np.float32, dtype, dtype, dtype]
    assert [a.dtype for a in found[5:]] == [np.float32] * 2


def test_default_tiles():
    """The shipped tiles of the widest heads; the last one overhangs the row."""
    size = Size(tokens=37, batch=1, heads=1, width=192, value_width=256)
    check(inputs(size), config=None)


def test_batches_of_calls():
    """Under vmap the kernels compute what they do alone."""
    args = inputs(Size(tokens=3, heads=1), document=[[0] * 2 + [1]] * 2)
    call = both_passes(scale=0.25, config=TILES, interpret=True)
    batched = jax.jit(jax.vmap(call))(jax.tree.map(lambda a: a[:, None], args))
    assert_close(jax.tree.map(lambda a: np.asarray(a)[:, 0], batched), direct(args, 0.25), FORWARD)


KERNELS = ["squared_forward", "squared_queries_gradient", "squared_keys_gradient"]


@pytest.mark.parametrize(
    "entry", launches(KERNEL.name, "default"), ids=lambda e: f"{e.dtype}-{e.width}"
)
def test_every_entry_has_its_kernels_and_is_found(entry: Entry):
    found = [names for _, names in locked_names(KERNEL.name, entry)]
    assert found == [KERNELS[:1], KERNELS[1:]] * 2
    config, width = PairTiles(**entry.config), entry.width
    size = {"length": entry.length, "rows": entry.rows}
    assert find_config(entry.dtype, width, width, **size) == config
    assert find_config(entry.dtype, width - 1, width // 2, **size) == config
    for device in ("NVIDIA A100", "NVIDIA H200"):
        with stand_in_gpu(device):
            assert unmet(entry.dtype, entry.dtype, width, width, **size) is None


def test_the_table_has_every_dtype_and_width():
    for dtype in ("bfloat16", "float16", "float32"):
        widths = {e.width for e in TABLE if e.dtype == dtype}
        assert widths >= {32, 64, 128, 256}


def test_precision_of_float32_products():
    """Every product of the lowered kernels runs as asked; unasked, as three TF32 passes."""
    args = jax.eval_shape(lambda: inputs(Size(tokens=100, width=40)))

    def both(args: Inputs, **options: Any) -> tuple:
        options = options | {"scale": 1.0}
        operands, grads = Operands(*args[:5]), Outputs(*args[5:])
        backward = squared_backward(operands, grads, **options)
        return squared_forward(operands, **options), backward

    unasked = lower_for_cuda(both, args).as_text()
    for precision in ("default", "high", "highest"):
        asked = lower_for_cuda(functools.partial(both, precision=precision), args).as_text()
        assert (asked == unasked) == (precision == "high"), precision


def test_what_the_kernels_cannot_take():
    call = functools.partial(unmet, length=128, rows=4)
    f32 = jnp.float32
    assert call(f32, f32, 64, 257) == "kernels take head widths to 256, not 257"
    said = "kernels take bfloat16, float16, float32, not float64"
    for dtypes in ((f32, jnp.float64), (jnp.float64, f32)):
        assert call(*dtypes, 64, 64) == said
    for field in ("block_q", "block_k", "backward_q", "backward_k"):
        said = f"its configuration has {field}=48, which is no power of two from 16"
        assert call(f32, f32, 64, 64, config=dataclasses.replace(TILES, **{field: 48})) == said
    for field in ("num_warps", "backward_warps"):
        said = f"its configuration has {field}=3, which is no power of two from 1"
        assert call(f32, f32, 64, 64, config=dataclasses.replace(TILES, **{field: 3})) == said
    greedy = dataclasses.replace(TILES, block_q=256, block_k=256, num_stages=4)
    assert "bytes of shared memory" in (call(f32, f32, 256, 256, config=greedy) or "")
