"""The linear-attention kernels, interpreted, against quadratic formulas in float64."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops.linear_attention import LinearState
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
from tests.helpers import linear_attention as formula
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.linear_attention import exact, waves
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


def expected(args: Inputs, document: Any, scale: float) -> tuple[Outputs, Inputs]:
    """Return outputs and gradients in float64; the state is that of document 0."""
    *rows, memory, key_sum = jax.tree.map(np.float64, args)
    ids = None if document is None else 1 + np.asarray(document)  # 0 would be padding
    given = formula.Operands(*rows, LinearState(memory, key_sum))
    outputs, grads = exact(1, scale, given, ids, 1, with_total=key_sum is not None)
    return Outputs(*outputs[:2], *outputs.state), Inputs(*grads[:4], *grads.state)


@functools.cache
def compiled(scale: float, config: LinearAttentionConfig | None) -> Callable[..., Any]:
    """Compile both passes, with `waves` as cotangents."""
    options = {"scale": scale, "config": config, "interpret": True}

    def both(args: Inputs, document: Any) -> tuple[Outputs, Inputs]:
        operands = Operands(*args[:4], document, *args[4:])
        outputs = linear_forward(operands, **options)
        grads = waves(outputs)
        grads = grads._replace(y=jnp.asarray(grads.y, outputs.y.dtype))
        gradients = linear_backward(operands, grads, **options)
        return outputs, Inputs(*gradients[:4], *gradients[5:])

    return jax.jit(both)


def found(
    args: Inputs,
    document: Any = None,
    scale: float = 0.3,
    config: LinearAttentionConfig | None = TILES,
) -> tuple[Outputs, Inputs]:
    document = None if document is None else np.asarray(document, np.int32)
    return jax.tree.map(np.asarray, compiled(scale, config)(args, document))


def check(
    args: Inputs,
    document: Any = None,
    scale: float = 0.3,
    config: LinearAttentionConfig | None = TILES,
) -> None:
    outputs, grads = found(args, document, scale, config)
    wanted, wanted_grads = expected(args, document, scale)
    assert_close(outputs, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


# Lengths: one, one less than a chunk, a chunk, one more, and several chunks and some.
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (Size(length=1), {}),
        (Size(length=15, width=5, value_width=40), {}),
        (Size(length=16, heads=4, width=40, value_width=17), {}),
        (Size(length=17, heads=4, groups=1), {"gates": False}),
        (Size(length=53, heads=3, groups=3), {"totals": False}),
    ],
    ids=str,
)
def test_rows(size: Size, options: dict[str, Any]):
    check(inputs(size, **options))


# Documents that end before, at and after the edge of a chunk; the state is that of 0.
DOCUMENTS = [[0] * 15 + [1] * 17 + [2] * 5, [0] * 16 + [3] * 21, [1] * 17 + [2] + [4] * 19]
PACKED = Size(batch=3, heads=4, groups=2, width=24)


@pytest.mark.parametrize("both", [True, False], ids=["gates and totals", "neither"])
def test_documents(both: bool):
    check(inputs(PACKED, gates=both, totals=both), DOCUMENTS)


def test_the_first_gate_of_a_document_has_no_gradient():
    args = inputs(PACKED)
    outputs, grads = found(args, DOCUMENTS)
    starts = np.diff(DOCUMENTS, axis=1, prepend=0) != 0
    np.testing.assert_array_equal(grads.log_decay[starts], 0.0)
    # Nor does it change anything: it would let nothing or too much through.
    gates = np.array(args.log_decay)
    gates[starts] = np.where(np.arange(starts.sum()) % 2, -1e4, 100.0)[:, None]
    assert_close(found(args._replace(log_decay=gates), DOCUMENTS), (outputs, grads), GRADIENT)


def test_fast_decay():
    """A token reads itself alone, but what little passes a gate has a gradient."""
    args = inputs(Size())
    check(args._replace(log_decay=np.full_like(args.log_decay, -50.0)))


def test_extreme_gates():
    """Nothing forgotten, and gates that no float32 can tell from 0, before weak ones."""
    args = inputs(Size())
    gates = np.array(args.log_decay)
    gates[0, 5] = gates[1, 20:23] = -1e4
    gates[0, 30:] = 0.0
    gates[1, 3] = -np.inf
    outputs, grads = found(args._replace(log_decay=gates))
    finite = np.maximum(gates, -1e5)
    wanted, wanted_grads = expected(args._replace(log_decay=finite), None, 0.3)
    assert_close(outputs, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


def test_growth():
    """Gates may let the state grow, here by e^30 within a chunk and back."""
    args = inputs(Size())
    gates = np.array(args.log_decay)
    gates[:, 3:9], gates[:, 18:24] = 5.0, -5.0
    check(args._replace(log_decay=gates))


def test_large_products():
    args, large = inputs(Size()), np.float32(1000**0.5)
    check(args._replace(q=large * args.q, k=large * args.k))


def test_default_tiles():
    """The shipped tiles of wide heads; the last chunk overhangs the row."""
    check(inputs(Size(length=70, batch=1, width=100, value_width=72)), scale=0.1, config=None)


def test_default_tiles_of_the_widest_heads():
    size = Size(length=19, batch=1, heads=1, groups=1, width=192, value_width=256)
    check(inputs(size), scale=0.05, config=None)


def halves(dtype: Any, size: float = 1.0) -> Inputs:
    args = inputs(Size(heads=4))
    return args._replace(**{n: (size * getattr(args, n)).astype(dtype) for n in "qkv"})


@pytest.mark.parametrize(
    ("dtype", "forward", "gradient"),
    [
        (jnp.bfloat16, BFLOAT16, HALF_GRADIENT),
        (np.float16, Budget(1e-2, 1e-2, 2e-3), Budget(1e-2, 1e-2, 2e-3)),
    ],
    ids=["bfloat16", "float16"],
)
def test_dtypes(dtype: Any, forward: Budget, gradient: Budget):
    args = halves(dtype)
    outputs, grads = found(args)
    assert outputs.y.dtype == (np.float32 if dtype == np.float16 else dtype)
    assert [g.dtype for g in grads[:4]] == [dtype] * 3 + [np.float32]
    wanted, wanted_grads = expected(args, None, 0.3)
    assert_close(outputs, wanted, forward)
    assert_close(grads, wanted_grads, gradient)


def test_float16_states_beyond_float16():
    args = halves(np.float16, 200.0)
    args = args._replace(log_decay=np.zeros_like(args.log_decay))
    outputs, _ = found(args)
    wanted, _ = expected(args, None, 0.3)
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
