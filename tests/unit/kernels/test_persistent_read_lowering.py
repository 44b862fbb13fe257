"""The kernels of the persistent read lower for CUDA, and refuse what they cannot take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops.attention import Dropout
from jaxmem.ops.dispatch import explain
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._compat import lower_for_cuda, stand_in_gpu
from pallas_kernels._launch import Entry, entries, shared_limit
from pallas_kernels._lock import launches
from pallas_kernels.persistent_read import PersistentReadConfig, find_config, launch
from pallas_kernels.persistent_read.cases import cases
from tests.helpers.lowering import kernel_names, locked_names

TABLE = entries("persistent_read")
NAMES = [
    "persistent_read_forward",
    "persistent_read_queries_gradient",
    "persistent_read_tables_gradient",
]


@pytest.mark.parametrize(
    "entry", launches("persistent_read", "default"), ids=lambda e: f"{e.dtype}-{e.width}"
)
def test_the_kernels_of_every_entry(entry: Entry):
    found = locked_names("persistent_read", entry)
    assert found == [(name + kind, [name]) for kind in ("", "_banks") for name in NAMES]


def test_cases_hold_the_call_of_a_model_trained_in_half_precision():
    """Float32 queries and keys, bfloat16 values, several banks, no dropout, and narrower values."""
    entry = next(e for e in TABLE if e.dtype == "float32")
    case = next(case for case in cases(entry) if case.name == "persistent_read_forward_banks")
    (operands,) = case.operands
    q, keys, values = operands.q, operands.keys, operands.values
    assert (q.dtype, keys.dtype, values.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert (len(keys.shape), keys.shape[0]) == (4, 2)
    assert values.shape[-1] < keys.shape[-1] == entry.width
    assert case.function.keywords["rate"] == 0.0


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.dtype}-{e.width}")
def test_every_entry_fits(entry: Entry):
    config = PersistentReadConfig(**entry.config)
    width, dtype = entry.width, entry.dtype
    assert launch.shared_bytes(config, width, width, dtype, dtype) <= shared_limit(None)
    assert find_config(dtype, width, width, rows=entry.length, tables=entry.rows) == config


def shapes(width: int = 40) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((2, 33, 3, width), (2, 3, 70, width), (2, 3, 70, width))
    )


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_a_step_on_a_gpu_calls_the_three_kernels(implementation: Any):
    def loss(q: jax.Array, keys: jax.Array, values: jax.Array, key: jax.Array) -> jax.Array:
        dropout = Dropout(0.1, key)
        return jnp.sum(
            persistent_read(
                q,
                keys,
                values,
                scale=jnp.ones(3),
                dropout=dropout,
                implementation=implementation,
            )
        )

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *shapes(), key)
    assert kernel_names(lowered) == NAMES


def test_shares_of_the_queries_keep_a_gpu_busy():
    config = find_config("bfloat16", 64, 64, rows=4096, tables=12)
    assert launch.splits(12, 2688, 4096, config) == 1  # 12 x 42 programs are enough
    assert launch.splits(4, 448, 4096, config) == 10  # of 28 programs
    assert launch.splits(4, 448, 64, config) == 1  # one tile cannot be shared


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (shapes(width=264), "head widths to 256, not 264"),
        (shapes(width=256), "no launch configuration for float32 of width 256"),
    ],
    ids=["width", "float32-width"],
)
def test_what_the_kernels_cannot_take(operands: tuple[Any, ...], message: str):
    with pytest.raises(KernelUnsupported, match=message):
        explain("persistent_read", *operands, scale=jnp.ones(3), implementation="pallas")
    with stand_in_gpu():
        choice = explain("persistent_read", *operands, scale=jnp.ones(3))
    assert choice.implementation == "xla"


def test_odd_tiles_are_said_by_the_op():
    config = dataclasses.replace(PersistentReadConfig(**TABLE[0].config), block_pairs=48)
    options = {"scale": jnp.ones(3), "implementation": "pallas", "config": config}
    with pytest.raises(KernelUnsupported, match="block_pairs=48, which is no power of two"):
        explain("persistent_read", *shapes(), **options)


def test_nothing_to_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, table = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 2, 5, 4))
    with pytest.raises(ShapeError, match=r"an axis .* is empty"):
        persistent_read(q, table[:, :, :0], table[:, :, :0], scale=jnp.ones(2))
    nothing = persistent_read(q[:, :0], table, table, scale=jnp.ones(2))
    assert nothing.shape == (1, 0, 2, 4)
