"""Run what suits the platform that code is compiled for, which a trace does not always know.

A process with a GPU may still run code on its CPU: under `jax.default_device`, or because the
arrays stand there. Where that is possible both variants are traced, and the compiler takes one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxmem.errors import KernelUnsupported
from pallas_kernels._compat import only_cpu

Result = TypeVar("Result")


def on_cpu_or_elsewhere(
    cpu: Callable[..., Result], elsewhere: Callable[..., Result], *operands: Any
) -> Result:
    """Call one of two equal functions, the first one where the code runs on a CPU.

    Operands are trees of arrays; the functions return trees of equal shapes and dtypes.
    """
    if only_cpu():
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=elsewhere)


class Kernel(NamedTuple):
    """A kernel with its gradient, and what computes the same where there is no GPU.

    `static` is what a call does not trace, hashable; `operands` is a tuple of trees of arrays. The
    functions stand in a module, so that calls which agree in all that is static share a trace.
    """

    op: str
    """Name of the op, for messages."""
    forward: Callable[[Any, Any], tuple[Any, Any]]
    """(static, operands) -> (outputs, saved): arrays that the backward pass needs."""
    backward: Callable[[Any, Any, Any, Any], Any]
    """(static, operands, saved, cotangents of the outputs) -> cotangents of the operands, a tree
    like them with None for what is not differentiated."""
    plain: Callable[[Any, Any], Any]
    """(static, operands) -> outputs, in plain JAX that can be differentiated."""


def run_kernel(kernel: Kernel, static: Any, *operands: Any, elsewhere: bool) -> Any:
    """Run a kernel; with `elsewhere`, its plain form where the code does not run on a GPU.

    Raises:
      KernelUnsupported: a derivative of higher than the first order is taken.
    """
    return _run(kernel, static, elsewhere, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(kernel: Kernel, static: Any, elsewhere: bool, operands: tuple) -> Any:
    return _run_forward(kernel, static, elsewhere, operands)[0]


def _run_forward(
    kernel: Kernel, static: Any, elsewhere: bool, operands: tuple
) -> tuple[Any, tuple[Any, Any]]:
    outputs, saved = _forward(kernel, static, elsewhere, operands)
    return outputs, (operands, saved)


def _run_backward(
    kernel: Kernel, static: Any, elsewhere: bool, residuals: tuple, grads: Any
) -> tuple[Any]:
    return (_backward(kernel, static, elsewhere, *residuals, grads),)


_run.defvjp(_run_forward, _run_backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(kernel: Kernel, static: Any, elsewhere: bool, operands: tuple) -> tuple[Any, Any]:
    on_gpu = _first_order(kernel.op, functools.partial(kernel.forward, static))
    if not elsewhere:
        return on_gpu(operands)
    shapes = jax.eval_shape(on_gpu, operands)

    def plain(operands: tuple) -> tuple[Any, Any]:
        # What a kernel saves is not needed: the plain form is differentiated from its operands.
        saved = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
        return _cast(kernel.plain(static, operands), shapes[0]), saved

    return lax.platform_dependent(operands, cuda=on_gpu, default=plain)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    kernel: Kernel, static: Any, elsewhere: bool, operands: tuple, saved: Any, grads: Any
) -> Any:
    def gradients(operands: tuple, saved: Any, grads: Any) -> Any:
        return kernel.backward(static, operands, saved, grads)

    on_gpu = _first_order(kernel.op, gradients)
    if not elsewhere:
        return on_gpu(operands, saved, grads)
    shapes = jax.eval_shape(on_gpu, operands, saved, grads)

    def plain(operands: tuple, saved: Any, grads: Any) -> Any:
        del saved
        leaves, tree = jax.tree.flatten(operands)
        inexact = [n for n, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact)]

        def outputs(*values: Any) -> Any:
            known = dict(zip(inexact, values, strict=True))
            whole = [known.get(n, leaf) for n, leaf in enumerate(leaves)]
            return kernel.plain(static, jax.tree.unflatten(tree, whole))

        y, pull = jax.vjp(outputs, *(leaves[n] for n in inexact))
        found = dict(zip(inexact, pull(_cast(grads, y)), strict=True))
        gradient = jax.tree.unflatten(tree, [found.get(n) for n in range(len(leaves))])
        return jax.tree.map(lambda s, a: a.astype(s.dtype), shapes, gradient)

    return lax.platform_dependent(operands, saved, grads, cuda=on_gpu, default=plain)


def _cast(values: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, s: a.astype(s.dtype), values, like)


def _first_order(op: str, kernel: Callable[..., Result]) -> Callable[..., Result]:
    """Refuse to differentiate a pass of a kernel, which would be a second derivative of the op.

    Raises:
      KernelUnsupported: the call is differentiated.
    """

    @jax.custom_jvp
    def call(*operands: Any) -> Result:
        return kernel(*operands)

    @call.defjvp
    def _differentiate(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        del primals, tangents
        raise KernelUnsupported(
            f"{op} with implementation 'pallas' has first derivatives only, and a second one was "
            "asked for. Use implementation='xla' there."
        )

    return call
