"""Forward pass of linear attention."""

import jax.numpy as jnp

from pallas_kernels._compat import Precision
from pallas_kernels.linear_attention.launch import (
    LinearAttentionConfig,
    Operands,
    Outputs,
    find_config,
)
from pallas_kernels.linear_attention.walk import Inputs, Wanted, walk


def linear_forward(
    operands: Operands,
    *,
    scale: float,
    precision: Precision | None = None,
    config: LinearAttentionConfig | None = None,
    interpret: bool = False,
) -> Outputs:
    """Run S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, z_t = e^{g_t} z_{t-1} + k_t.

    y_t = scale S_tᵀ q_t, total_t = scale <q_t, z_t>. S and z restart at 0 where the document
    changes. Head h uses query and key h // (H / G).

    One walk (`walk.walk`): grid (V / block, H, B), products of chunks of C tokens, the state
    [K, block] in registers. Nothing is saved for the backward pass. Not measured on a device yet.

    Args:
      operands: arrays.
      scale: factor of the result.
      precision: of float32 products; None: three TF32 passes for <q, k>, one for the rest.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.
    """
    q, k, v, _, _, _, key_sum = operands
    config = config or find_config(q, k, v)
    found = walk(
        Inputs(*operands),
        config.forward,
        name="linear_forward",
        scale=scale,
        dtype=jnp.float32 if v.dtype == jnp.float16 else v.dtype,
        wanted=Wanted(state=True, sums=key_sum is not None, total=key_sum is not None),
        precision=precision,
        interpret=interpret,
    )
    return Outputs(found.out, found.total, found.state, found.sums)
