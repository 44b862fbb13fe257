"""The linear-attention kernels, interpreted, against quadratic formulas in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import lower_for_cuda
from pallas_kernels._launch import Entry, entries, shared_limit
from pallas_kernels._lock import launches
from pallas_kernels.linear_attention import (
    NAME,
    LinearAttentionConfig,
    Operands,
    Outputs,
    find_config,
    linear_backward,
    linear_forward,
    unmet,
)
from pallas_kernels.linear_attention.launch import shared_bytes
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.lowering import kernel_names, locked_names

TILES = LinearAttentionConfig(chunk=16, block=16, backward_chunk=16, backward_block=16)
"""Small enough that few tokens make several chunks, and narrow heads several blocks."""
HALF_GRADIENT = Budget(rtol=5e-2, atol=5e-2, rms=2e-2)
KERNELS = ["linear_queries_gradient", "linear_keys_gradient", "linear_values_gradient"]


class Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any
    log_decay: Any
    memory: Any
    key_sum: Any


class Size(NamedTuple):
    length: int = 37
    batch: int = 2
    heads: int = 2
    groups: int = 2
    width: int = 16
    value_width: int = 16


def inputs(size: Size, *, gates: bool = True, totals: bool = True) -> Inputs:
    draw = np.random.default_rng(size.length)
    batch, length, heads, groups, width, value_width = (
        size.batch,
        size.length,
        size.heads,
        size.groups,
        size.width,
        size.value_width,
    )

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    return Inputs(
        normal(batch, length, groups, width),
        normal(batch, length, groups, width),
        normal(batch, length, heads, value_width),
        0.2 * normal(batch, length, heads) - 0.3 if gates else None,
        normal(batch, heads, width, value_width),
        normal(batch, heads, width) if totals else None,
    )


def wave(array: Any, phase: float) -> np.ndarray:
    """Return a cotangent."""
    return np.cos(np.arange(array.size) + phase).reshape(array.shape).astype(np.float32)


def direct(args: Inputs, document: Any, scale: float) -> Outputs:
    """Compute every pair of tokens; the state is token -1 of document 0, with outer product S."""
    q, k, v, gates, memory, key_sum = args
    share = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(a, share, axis=2) for a in (q, k))
    batch, length, heads, _ = v.shape
    names = jnp.zeros((batch, length), jnp.int32) if document is None else document
    if gates is None:
        gates = jnp.zeros((batch, length, heads))
    # Sums over every span by themselves: differences of long sums would lose digits.
    steps = jnp.arange(length)
    inner = (steps[:, None, None] >= steps) & (steps > steps[:, None])  # i >= t > j
    between = jnp.einsum("ijt,bth->bhij", inner, gates)
    seen = (steps[:, None] >= steps) & (names[:, :, None] == names[:, None])
    decay = jnp.where(seen[:, None], jnp.exp(between), 0.0)
    weights = scale * jnp.einsum("bihk,bjhk->bhij", q, k) * decay
    fade = jnp.exp(jnp.cumsum(gates, axis=1)) * (names == 0)[..., None]
    y = jnp.einsum("bhij,bjhv->bihv", weights, v)
    y += scale * jnp.einsum("bihk,bhkv,bih->bihv", q, memory, fade)
    memory = fade[:, -1, :, None, None] * memory
    memory += jnp.einsum("bhj,bjhk,bjhv->bhkv", decay[:, :, -1], k, v)
    if key_sum is None:
        return Outputs(y, None, memory, None)
    total = jnp.sum(weights, axis=3).swapaxes(1, 2)
    total += scale * jnp.einsum("bihk,bhk,bih->bih", q, key_sum, fade)
    key_sum = fade[:, -1, :, None] * key_sum + jnp.einsum("bhj,bjhk->bhk", decay[:, :, -1], k)
    return Outputs(y, total, memory, key_sum)


def cotangents(outputs: Outputs) -> Outputs:
    return Outputs(*(None if o is None else wave(o, n) for n, o in enumerate(outputs)))


def expected(args: Inputs, document: Any, scale: float) -> tuple[Outputs, Inputs]:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)

        def both(args: Inputs) -> tuple[Outputs, Inputs]:
            outputs, pull = jax.vjp(lambda a: direct(a, document, scale), args)
            grads = jax.tree.map(lambda g: g.astype(jnp.float64), cotangents(outputs))
            return outputs, pull(grads)[0]

        return jax.tree.map(np.asarray, jax.jit(both)(wide))


def found(
    args: Inputs, document: Any, scale: float, config: LinearAttentionConfig | None = TILES
) -> tuple[Outputs, Inputs]:
    options = {"scale": scale, "config": config, "interpret": True}

    @jax.jit
    def both(args: Inputs) -> tuple[Outputs, Inputs]:
        operands = Operands(*args[:4], document, *args[4:])
        outputs = linear_forward(operands, **options)
        grads = cotangents(outputs)
        grads = grads._replace(y=jnp.asarray(grads.y, outputs.y.dtype))
        gradients = linear_backward(operands, grads, **options)
        return outputs, Inputs(*gradients[:4], *gradients[5:])

    return both(args)


def check(
    args: Inputs,
    document: Any = None,
    scale: float = 0.3,
    config: LinearAttentionConfig | None = TILES,
) -> None:
    document = None if document is None else jnp.asarray(document, jnp.int32)
    outputs, grads = found(args, document, scale, config)
    wanted, wanted_grads = expected(args, document, scale)
    assert_close(outputs, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


# Lengths: one, one less than a chunk, a chunk, one more, several and some.
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (Size(length=1), {}),
        (Size(length=15, width=5, value_width=40), {}),
        (Size(length=16, heads=4, width=40, value_width=17), {}),
        (Size(length=17, heads=4, groups=1), {"gates": False}),
        (Size(length=53, heads=3, groups=3), {"totals": False}),
        (Size(length=37), {"gates": False, "totals": False}),
    ],
    ids=str,
)
def test_rows(size: Size, options: dict[str, Any]):
    check(inputs(size, **options))


# Documents that end before, at and after the edge of a chunk; the state is that of 0.
DOCUMENTS = [[0] * 15 + [1] * 17 + [2] * 5, [0] * 16 + [3] * 21, [1] * 17 + [2] + [4] * 19]


@pytest.mark.parametrize("gates", [True, False])
def test_documents(gates: bool):
    check(inputs(Size(batch=3, heads=4, groups=2, width=24), gates=gates), DOCUMENTS)


def test_the_first_gate_of_a_document_has_no_gradient():
    args = inputs(Size(batch=3))
    document = jnp.asarray(DOCUMENTS, jnp.int32)
    _, grads = found(args, document, 0.3)
    starts = np.diff(np.asarray(DOCUMENTS), axis=1, prepend=0) != 0
    np.testing.assert_array_equal(np.asarray(grads.log_decay)[starts], 0.0)
    # Nor does it change anything: it would let nothing or too much through.
    gates = np.array(args.log_decay)
    gates[starts] = np.where(np.arange(starts.sum()) % 2, -1e4, 100.0)[:, None]
    assert_close(
        found(args._replace(log_decay=gates), document, 0.3), found(args, document, 0.3), GRADIENT
    )


def test_fast_decay():
    """A token reads itself alone, but what little passes a gate has a gradient."""
    args = inputs(Size(length=37))
    check(args._replace(log_decay=np.full_like(args.log_decay, -50.0)))


def test_extreme_gates():
    """Nothing forgotten, and gates that no float32 can tell from 0, before weak ones."""
    args = inputs(Size(length=53))
    gates = np.array(args.log_decay)
    gates[0, 5] = gates[1, 20:23] = -1e4
    gates[0, 30:] = 0.0
    gates[1, 3] = -np.inf
    finite = np.maximum(gates, -1e5)
    outputs, grads = found(args._replace(log_decay=gates), None, 0.3)
    wanted, wanted_grads = expected(args._replace(log_decay=finite), None, 0.3)
    assert_close(outputs, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


def test_growth():
    """Gates may let the state grow, here by e^30 within a chunk and back."""
    args = inputs(Size(length=37))
    gates = np.array(args.log_decay)
    gates[:, 3:9], gates[:, 18:24] = 5.0, -5.0
    check(args._replace(log_decay=gates))


def test_large_products():
    args = inputs(Size(length=21, heads=4, groups=2))
    check(args, scale=300.0)


def test_default_tiles():
    """The shipped tiles of wide heads; the last chunk overhangs the row."""
    check(inputs(Size(length=70, batch=1, width=100, value_width=72)), scale=0.1, config=None)


@pytest.mark.parametrize("width", [192, 256])
def test_default_tiles_of_the_widest_heads(width: int):
    size = Size(length=19, batch=1, heads=1, groups=1, width=width, value_width=width)
    check(inputs(size), scale=0.05, config=None)


@pytest.mark.parametrize(
    ("dtype", "forward", "gradient"),
    [
        (jnp.bfloat16, BFLOAT16, HALF_GRADIENT),
        (jnp.float16, Budget(1e-2, 1e-2, 2e-3), Budget(1e-2, 1e-2, 2e-3)),
    ],
    ids=["bfloat16", "float16"],
)
def test_dtypes(dtype: Any, forward: Budget, gradient: Budget):
    args = inputs(Size(heads=4))
    args = args._replace(**{name: jnp.asarray(getattr(args, name), dtype) for name in "qkv"})
    outputs, grads = found(args, None, 0.3)
    assert outputs.y.dtype == (jnp.float32 if dtype == jnp.float16 else dtype)
    assert [g.dtype for g in grads[:4]] == [dtype] * 3 + [jnp.float32]
    wanted, wanted_grads = expected(args, None, 0.3)
    assert_close(outputs, wanted, forward)
    assert_close(grads, wanted_grads, gradient)


def test_float16_states_beyond_float16():
    args = inputs(Size())
    args = args._replace(
        **{name: jnp.asarray(200.0 * getattr(args, name), jnp.float16) for name in "qkv"},
        log_decay=None,
    )
    outputs, _ = found(args, None, 1.0)
    wanted, _ = expected(args, None, 1.0)
    assert np.abs(wanted.y).max() > 1e6
    assert_close(outputs, wanted, FORWARD)


def label(entry: Entry) -> str:
    return f"{entry.dtype}-{entry.width}"


@pytest.mark.parametrize("entry", launches(NAME, "default"), ids=label)
def test_the_kernels_of_every_entry(entry: Entry):
    assert locked_names(NAME, entry) == [
        (f"linear_{name}{kind}", kernels)
        for kind in ("", "_full")
        for name, kernels in (("forward", ["linear_forward"]), ("backward", KERNELS))
    ]


def operands(dtype: Any, width: int = 40, value_width: int = 24) -> list[jax.ShapeDtypeStruct]:
    shapes = ((2, 33, 2, width), (2, 33, 2, width), (2, 33, 4, value_width))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_calls_without_gates_lower(dtype: Any, packed: bool):
    memory = jax.ShapeDtypeStruct((2, 4, 40, 24), jnp.float32)
    document = jax.ShapeDtypeStruct((2, 33), jnp.int32) if packed else None
    run = functools.partial(linear_forward, scale=0.1)
    given = Operands(*operands(dtype), None, document, memory, None)
    lowered = lower_for_cuda(run, given)
    assert kernel_names(lowered) == ["linear_forward"]


@pytest.mark.parametrize("entry", entries(NAME), ids=label)
def test_every_entry_fits_and_is_found(entry: Entry):
    config, width = LinearAttentionConfig(**entry.config), entry.width
    assert shared_bytes(config, width, width, entry.dtype) <= shared_limit(None)
    dtype = jnp.dtype(entry.dtype)
    for sizes in ((width, width), (width - 1, width // 2), (width // 2, width)):
        assert find_config(*operands(dtype, *sizes)) == config


def test_what_the_kernels_cannot_take():
    assert unmet(*operands(jnp.bfloat16)) is None
    assert unmet(*operands(jnp.float16)) is None
    assert "head widths to 256, not 264" in str(unmet(*operands(jnp.bfloat16, width=264)))
    assert "not float64" in str(unmet(*operands(np.float64)))
    for config, message in (
        (LinearAttentionConfig(block=48), "block=48, which is no power of two"),
        (LinearAttentionConfig(chunk=256), "chunks of 256 tokens, more than 128"),
        (LinearAttentionConfig(backward_stages=99), "bytes of shared memory"),
    ):
        assert message in str(unmet(*operands(jnp.bfloat16), config=config))
