"""Kernels compile for GPUs that are not here, and what the compiler says of them is read.

Run where the extra `aot` is installed: `JAX_PLATFORMS=cpu pytest tests/deviceless`. CI does. The
kernels of the launch tables stand in lock files, which `tests/unit/kernels/test_lock.py` checks.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _lock
from pallas_kernels._compat import launch, load, mm, pl, store
from pallas_kernels._deviceless import compile_for, kernel_uses, missing, workers

if missing() is not None:
    pytest.skip(str(missing()), allow_module_level=True)


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
    fitting, spilling = (functools.partial(multiply, rows=rows) for rows in (16, 32))
    narrow, wide = (jax.ShapeDtypeStruct((512, width), jnp.bfloat16) for width in (64, 256))
    with workers(2) as pool:
        first = pool.submit(kernel_uses, "NVIDIA A100", fitting, narrow, narrow)
        second = pool.submit(kernel_uses, "NVIDIA H200", spilling, wide, wide)
        (use,), (other,) = first.result(), second.result()
    assert (use.name, use.grid, use.threads, use.spill_bytes) == ("product", (1, 1, 1), 128, 0)
    assert 0 < use.shared_bytes <= 166912
    assert 16 < use.registers < 255 == other.registers
    assert other.spill_bytes > 1000
    assert [int(number) for number in use.ptxas.split(".")] >= [12]


def test_a_row_is_what_the_compiler_says_now():
    """One of the rows, compiled again: whoever writes the files by hand is found out."""
    call = _lock.calls("gated_scan", "default")[0]
    row = _lock.read("gated_scan", "default").rows[_lock.key(call, "NVIDIA H200")]
    with workers(1) as pool:
        uses = pool.submit(
            kernel_uses, "NVIDIA H200", call.case.function, *call.case.operands
        ).result()
    if uses[0].ptxas != row.ptxas or not _lock.compared(_lock.read("gated_scan", "default")):
        pytest.skip(f"another compiler than that of the lock file: ptxas {uses[0].ptxas}")
    assert row.kernels == {use.name: use.numbers() for use in uses if use.name in row.kernels}


def test_without_the_log_of_the_assembler_nothing_is_told():
    operand = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    with pytest.raises(RuntimeError, match=r"product is not in XLA's log\. Call kernel_uses in a"):
        kernel_uses("NVIDIA A100", functools.partial(multiply, rows=16), operand, operand)
