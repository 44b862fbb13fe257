"""What runs where: the platform that code is compiled for decides, not the one of the process.

That every op does so is in test_transforms.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxmem.errors import KernelUnsupported
from jaxmem.ops.platforms import Kernel, on_cpu_or_elsewhere, run_kernel
from pallas_kernels._compat import launch, load, pl, stand_in_gpu, store

X = jnp.asarray(np.linspace(0.1, 0.9, 16, dtype=np.float32))
TABLE = jnp.asarray(np.array([1, 0], np.int32))


class Static(NamedTuple):
    """What a call does not trace."""

    power: int
    interpret: bool


def times(x: Array, factor: float, interpret: bool) -> Array:
    def body(x_ref: Any, y_ref: Any) -> None:
        store(y_ref.at[:], load(x_ref.at[:]) * factor)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    options = {"num_warps": 1, "num_stages": 1, "interpret": interpret, "grid": (1,)}
    spec = pl.BlockSpec(x.shape, lambda i: (0,))
    run = launch(body, name="times", in_specs=[spec], out_specs=spec, out_shape=shape, **options)
    return run(x)


def forward(static: Static, operands: tuple) -> tuple[Array, Array]:
    x, _ = operands
    y = times(x, 1.0, static.interpret) ** static.power
    return y, 2.0 * x


def backward(static: Static, operands: tuple, saved: Array, grad: Array) -> tuple:
    del operands
    return times(grad, static.power, static.interpret) * (saved / 2.0) ** (static.power - 1), None


def plain(static: Static, operands: tuple) -> Array:
    return operands[0] ** static.power


KERNEL = Kernel("cube", forward, backward, plain)


def cube(x: Array, *, elsewhere: bool = True, interpret: bool = False) -> Array:
    return run_kernel(KERNEL, Static(3, interpret), x, TABLE, elsewhere=elsewhere)


def slope(x: Array, **options: bool) -> Array:
    return jax.grad(lambda x: jnp.sum(cube(x, **options)))(x)


@pytest.mark.parametrize("call", [cube, slope], ids=["forward", "backward"])
def test_a_kernel_is_compiled_for_a_gpu_and_plain_jax_for_a_cpu(call: Callable):
    with stand_in_gpu():
        traced = jax.jit(call).trace(X)
        on_cpu, on_gpu = (traced.lower(lowering_platforms=(p,)) for p in ("cpu", "cuda"))
    assert "triton" in on_gpu.as_text()
    assert "triton" not in on_cpu.as_text()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_the_plain_form_runs_where_the_arrays_are(wrap: Callable):
    x = np.asarray(X)
    x = np.stack([x, -x]) if wrap is jax.vmap else x
    with stand_in_gpu():
        y, dx = wrap(cube)(x), wrap(slope)(x)
    np.testing.assert_allclose(y, x**3, rtol=1e-5)
    np.testing.assert_allclose(dx, 3 * x**2, rtol=1e-5)


def test_a_named_kernel_runs_and_has_no_second_derivative():
    options = {"elsewhere": False, "interpret": True}
    y, dx = jax.jit(lambda x: (cube(x, **options), slope(x, **options)))(X)
    x = np.asarray(X)
    np.testing.assert_allclose(y, x**3, rtol=1e-5)
    np.testing.assert_allclose(dx, 3 * x**2, rtol=1e-5)
    with pytest.raises(KernelUnsupported, match=r"cube .*first derivatives only.*'xla'"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(slope(x, **options))), X)


def test_plain_forms_of_a_cpu_and_of_another_platform():
    def call(x: Array) -> Array:
        return on_cpu_or_elsewhere(lambda x: jnp.sort(x), lambda x: jnp.cumsum(x), x)

    np.testing.assert_allclose(jax.jit(call)(X), np.sort(X))
    with stand_in_gpu():
        traced = jax.jit(lambda x: call(x)).trace(X)
        on_cpu, on_gpu = (traced.lower(lowering_platforms=(p,)) for p in ("cpu", "cuda"))
    assert ("stablehlo.sort" in on_cpu.as_text(), "stablehlo.sort" in on_gpu.as_text()) == (
        True,
        False,
    )
