"""The kernel calls of a table entry, for the lowering test, the compile gate and benchmarks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._launch import Case, Entry
from pallas_kernels.gated_scan.backward import gated_scan_backward
from pallas_kernels.gated_scan.forward import gated_scan_forward
from pallas_kernels.gated_scan.launch import GatedScanConfig
from pallas_kernels.gated_scan.steps import GradInputs, Inputs


def cases(entry: Entry) -> list[Case]:
    """Return the calls of both passes, for rows of one document and for packed rows."""
    batch = max(entry.rows // -(-entry.width // 64), 1)
    shape = (batch, entry.length, entry.width)
    x = _array(shape, jnp.dtype(entry.dtype))
    log_decay = _array(shape, jnp.float32)
    state = _array((batch, entry.width), jnp.float32)
    kinds = _array(shape[:2], jnp.int32)
    config = GatedScanConfig(**entry.config)
    forward = functools.partial(gated_scan_forward, config=config)
    backward = functools.partial(gated_scan_backward, x_dtype=x.dtype, config=config)
    grads = GradInputs(x, state, x, log_decay, state)
    return [
        Case("gated_forward", forward, (Inputs(x, log_decay, state),)),
        Case("gated_forward_packed", forward, (Inputs(x, log_decay, state, kinds),)),
        Case("gated_backward", backward, (grads,)),
        Case("gated_backward_packed", backward, (grads._replace(kinds=kinds),)),
    ]


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
