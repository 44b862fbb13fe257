"""Kernels have no derivative of their own: say so clearly where a second derivative needs one."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxmem.errors import KernelUnsupported

Result = TypeVar("Result")


def first_order(op: str, kernel: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a kernel call inside an op's `custom_vjp`, whose passes are all that is differentiated.

    Raises:
      KernelUnsupported: the call is differentiated, so a derivative of higher order is wanted.
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
