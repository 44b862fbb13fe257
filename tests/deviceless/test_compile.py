"""Every kernel compiles for every GPU generation with every launch configuration, and none spills.

Run where the extra `aot` is installed: `JAX_PLATFORMS=cpu pytest tests/deviceless`. CI does.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels._compat import launch, load, mm, pl, store
from pallas_kernels._deviceless import compile_for, kernel_uses, missing
from pallas_kernels._launch import TABLES, Entry
from tests.helpers.lowering import launches

if missing() is not None:
    pytest.skip(str(missing()), allow_module_level=True)

KINDS = ("NVIDIA A100", "NVIDIA H200")
# The tests run XLA without optimisation, for speed; kernels are judged as users get them.
OPTIMISED = {"xla_backend_optimization_level": 3}


def tables() -> list[tuple[str, Entry]]:
    devices = sorted(folder.name for folder in TABLES.iterdir() if folder.is_dir())
    return [
        (kernel, entry)
        for kernel in pallas_kernels.names()
        for device in devices
        for entry in launches(kernel, device)
    ]


def label(value: object) -> str | None:
    if isinstance(value, Entry):
        return f"{value.dtype}-w{value.width}-t{value.length}-r{value.rows}"
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kernel", "entry"), tables(), ids=label)
def test_kernels_compile_and_do_not_spill(kernel: str, entry: Entry, kind: str):
    cases = pallas_kernels.cases_of(kernel).cases(entry)
    assert cases
    for case in cases:
        compile_for(
            kind, case.function, *case.operands, spills=bool(entry.spills), options=OPTIMISED
        )


def test_every_kernel_has_a_table():
    assert {kernel for kernel, _ in tables()} == set(pallas_kernels.names())


def product(x_ref, y_ref, o_ref, *, rows: int):
    def body(n: jax.Array, total: jax.Array) -> jax.Array:
        part = pl.ds(n * rows, rows)
        return total + mm(load(x_ref.at[part, :]), load(y_ref.at[part, :]), ta=True)

    width = o_ref.shape[0]
    total = jax.lax.fori_loop(
        0, x_ref.shape[0] // rows, body, jnp.zeros((width, width), jnp.float32)
    )
    store(o_ref.at[:, :], total)


def multiply(x: jax.Array, y: jax.Array, *, rows: int) -> jax.Array:
    """A kernel that holds a whole (width, width) product in registers."""
    length, width = x.shape
    whole = pl.BlockSpec((length, width), lambda i: (0, 0))
    return launch(
        functools.partial(product, rows=rows),
        name="product",
        grid=(1,),
        in_specs=[whole, whole],
        out_specs=pl.BlockSpec((width, width), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((width, width), jnp.float32),
        num_warps=4,
        num_stages=2,
        interpret=False,
    )(x, y)


def test_the_gate_sees_spills_and_too_much_shared_memory():
    operand = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    spilling = functools.partial(multiply, rows=32)
    compile_for("NVIDIA H200", spilling, operand, operand)
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for("NVIDIA H200", spilling, operand, operand, spills=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_for("NVIDIA H200", functools.partial(multiply, rows=512), operand, operand)


def test_what_a_kernel_takes_is_told():
    operand = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    (use,) = kernel_uses("NVIDIA A100", functools.partial(multiply, rows=16), operand, operand)
    assert (use.name, use.grid, use.threads) == ("product", (1, 1, 1), 128)
    assert 0 < use.shared_bytes <= 166912
