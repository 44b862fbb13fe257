"""The attention kernels lower for CUDA, and refuse what they cannot take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmem.errors import KernelUnsupported
from jaxmem.ops.attention import Dropout, attention
from jaxmem.ops.dispatch import explain
from jaxmem.reports.benchmark.baselines import jax_kernel_attention
from pallas_kernels._compat import KERNEL_CALL, lower_for_cuda, stand_in_gpu
from pallas_kernels._launch import Entry, entries, shared_limit
from pallas_kernels._lock import launches
from pallas_kernels.attention import find_config, launch
from pallas_kernels.pairs import PairTiles
from tests.helpers.lowering import kernel_names, locked_names

TABLE = entries("attention")
NAMES = ["attention_forward", "attention_queries_gradient", "attention_keys_gradient"]


def label(entry: Entry) -> str:
    return f"{entry.dtype}-{entry.width}"


@pytest.mark.parametrize("entry", launches("attention", "default"), ids=label)
def test_the_kernels_of_every_entry(entry: Entry):
    wanted = [(name + kind, [name]) for kind in ("", "_full", "_forget") for name in NAMES]
    wanted.remove(("attention_forward_forget", ["attention_forward"]))
    assert locked_names("attention", entry) == wanted


def test_what_a_call_does_not_have_is_no_operand():
    """A plain forward pass reads scale, q, k and v; only values with gates have those too."""

    def count(**options: Any) -> int:
        def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, scale=1.0, implementation="pallas", **options)

        text = lower_for_cuda(read, *operands()).as_text()
        (call,) = (line for line in text.splitlines() if KERNEL_CALL in line)
        return call.split("(tensor<")[1].split("->")[0].count("tensor<") + 1

    gate = jnp.ones((2, 33, 4))
    assert [count(), count(clamp=5.0), count(value_gate=gate)] == [4, 4, 5]


@pytest.mark.parametrize("entry", TABLE, ids=label)
def test_every_entry_fits_and_is_found(entry: Entry):
    config, width = PairTiles(**entry.config), entry.width
    assert launch.shared_bytes(config, width, width, entry.dtype, entry.dtype) <= shared_limit(None)
    size = {"length": entry.length, "rows": entry.rows}
    assert find_config(entry.dtype, width, width, **size) == config
    assert find_config(entry.dtype, width - 1, width // 2, **size) == config


def operands(width: int = 40, dtype: Any = jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = ((2, 33, 4, width), (2, 33, 2, width), (2, 33, 2, 24))
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_a_step_on_a_gpu_calls_the_three_kernels(implementation: Any):
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array) -> jax.Array:
        options = {"dropout": Dropout(0.1, key), "implementation": implementation}
        options |= {"clamp": 5.0, "value_gate": jax.nn.sigmoid(q[..., 0])}
        return jnp.sum(attention(q, k, v, scale=jnp.ones(4), lag=1, **options))

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *operands(), key)
    assert kernel_names(lowered) == NAMES


def test_the_kernel_that_ours_is_measured_against_lowers_too():
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jax_kernel_attention(q, k, v))

    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), shape, shape, shape)
    wanted = {"mha_forward", "mha_preprocess_backward", "mha_backward"}
    assert set(kernel_names(lowered)) == wanted


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (operands(width=264), "head widths to 256, not 264"),
        (operands(width=256, dtype=jnp.float32), "no launch configuration for float32 of width"),
    ],
    ids=["width", "float32-width"],
)
def test_what_the_kernels_cannot_take(arrays: tuple[Any, ...], message: str):
    with pytest.raises(KernelUnsupported, match=message):
        explain("attention", *arrays, scale=1.0, implementation="pallas")
    with stand_in_gpu():
        assert explain("attention", *arrays, scale=1.0).implementation == "xla"


def test_odd_tiles_are_said_by_the_op():
    config = dataclasses.replace(PairTiles(**TABLE[0].config), block_k=48)
    options = {"scale": 1.0, "implementation": "pallas", "config": config}
    with pytest.raises(KernelUnsupported, match="block_k=48, which is no power of two"):
        explain("attention", *operands(), **options)


def test_too_much_shared_memory_is_said_before_anything_is_compiled():
    greedy = PairTiles(
        block_q=256,
        block_k=256,
        num_warps=8,
        num_stages=4,
        backward_q=64,
        backward_k=64,
        backward_warps=8,
        backward_stages=2,
    )
    options = {"scale": 1.0, "implementation": "pallas", "config": greedy}
    with pytest.raises(KernelUnsupported, match="bytes of shared memory"):
        explain("attention", *operands(width=128), **options)
