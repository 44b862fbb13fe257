"""Forward pass of linear attention."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels._compat import Precision
from pallas_kernels.linear_attention.launch import LinearAttentionConfig, find_config
from pallas_kernels.linear_attention.walk import Inputs, Wanted, walk


def linear_forward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    document: Array | None,
    memory: Array,
    key_sum: Array | None,
    *,
    scale: float,
    precision: Precision | None = None,
    config: LinearAttentionConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array, Array | None]:
    """Run S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, z_t = e^{g_t} z_{t-1} + k_t.

    y_t = scale S_tᵀ q_t, total_t = scale <q_t, z_t>. S and z restart at 0 where the document
    changes. Head h uses query and key h // (H / G).

    One walk (`walk.walk`): grid (V / block, H, B), products of chunks of C tokens, the state
    [K, block] in registers. Nothing is saved for the backward pass. Not measured on a device yet.

    Args:
      q: queries [B T G K], any T >= 1; G divides H.
      k: keys [B T G K], zero at padding.
      v: values [B T H V], zero at padding.
      log_decay: g [B T H], zero at padding; positive ones let the state grow, within float32. None:
        nothing is forgotten.
      document: number of the document of each token [B T], int32, non-decreasing; 0 continues
        that of the state. None: all do.
      memory: S before the first token [B H K V], float32.
      key_sum: z before the first token [B H K], float32; None: no totals.
      scale: factor of the result.
      precision: of float32 products; None: three TF32 passes for <q, k>, one for the rest.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      y [B T H V] in the dtype of v (float32 for float16, which it may exceed), total [B T H], and S
      and z after the last token, of its document; float32, total and z None without `key_sum`.
    """
    config = config or find_config(q, k, v)
    outputs = walk(
        Inputs(q, k, v, log_decay, document, memory, key_sum),
        config.forward,
        name="linear_forward",
        scale=scale,
        dtype=jnp.float32 if v.dtype == jnp.float16 else v.dtype,
        wanted=Wanted(state=True, sums=key_sum is not None, total=key_sum is not None),
        precision=precision,
        interpret=interpret,
    )
    return outputs.out, outputs.total, outputs.state, outputs.sums
