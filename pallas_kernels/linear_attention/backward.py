"""Backward pass of linear attention: three walks, from the inputs alone.

With p_ij = dy_i·v_j + dtotal_i and D_ij what the gates between j and i let through:
dq_i = scale Σ_j D_ij p_ij k_j, dk_j = scale Σ_i D_ij p_ij q_i and
dv_j = scale Σ_i D_ij (q_i·k_j) dy_i.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision
from pallas_kernels.linear_attention.launch import LinearAttentionConfig, find_config
from pallas_kernels.linear_attention.walk import Inputs, Wanted, walk


def linear_backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    document: Array | None,
    memory: Array,
    key_sum: Array | None,
    dy: Array,
    dtotal: Array | None,
    dmemory: Array,
    dkey_sum: Array | None,
    *,
    scale: float,
    precision: Precision | None = None,
    config: LinearAttentionConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None, Array, Array | None]:
    """Return the gradients of what `linear_forward` takes.

    Three walks (`walk.walk`): forwards with S for dq, in reverse with the gradient of S for dk and
    for dv. Each owns blocks of the width of its own result, so that no program adds to what another
    one writes. The gate at t gets what crosses it: what came before less what ended there plus what
    began, that is F_t = F_{t-1} + <k, dk>_{t-1} - <q, dq>_{t-1}, from the float32 accumulators and
    without what a token gives itself, which crosses no gate. Gradients of heads that share q and k
    are added in float32. FLOPs three times those of the forward pass; bytes 14 tensors of its 4,
    and those of dq and dk per head in float32 where heads share them. Not measured on a device yet.

    Args:
      q: queries [B T G K]; what is not said here is as in `linear_forward`.
      k: keys [B T G K].
      v: values [B T H V].
      log_decay: log gates [B T H].
      document: documents of the tokens [B T].
      memory: S before the first token [B H K V].
      key_sum: z before the first token [B H K].
      dy: cotangent of y [B T H V].
      dtotal: cotangent of the totals [B T H], float32; None without `key_sum`.
      dmemory: cotangent of S after the last token [B H K V], float32.
      dkey_sum: cotangent of z after the last token [B H K], float32; None without `key_sum`.
      scale: factor of the result.
      precision: of float32 products.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.

    Returns:
      dq, dk, dv in the dtypes of q, k and v; dlog_decay [B T H], the cotangents of S and z before
      the first token, float32; None for what is None.
    """
    config = config or find_config(q, k, v)
    run = functools.partial(
        walk, tiling=config.backward, scale=scale, precision=precision, interpret=interpret
    )
    through = (log_decay, document)
    by_q, by_k = (v.shape[2] // x.shape[2] for x in (q, k))
    for_q = run(
        Inputs(dy, v, k, *through, memory, key_sum, dtotal, _if(log_decay, q)),
        name="linear_queries_gradient",
        dtype=q.dtype if by_q == 1 else jnp.float32,
        wanted=Wanted(),
        turned=True,
    )
    for_k = run(
        Inputs(v, dy, q, *through, dmemory, dkey_sum, dtotal, _if(log_decay, k)),
        name="linear_keys_gradient",
        dtype=k.dtype if by_k == 1 else jnp.float32,
        wanted=Wanted(sums=key_sum is not None),
        reverse=True,
        turned=True,
    )
    for_v = run(
        Inputs(k, q, dy, *through, dmemory),
        name="linear_values_gradient",
        dtype=v.dtype,
        wanted=Wanted(state=True),
        reverse=True,
    )
    dlog_decay = None
    if log_decay is not None:
        started = jnp.sum(for_v.state * memory, axis=(2, 3))
        if key_sum is not None:
            started += jnp.sum(for_k.sums * key_sum, axis=2)
        crossing = jnp.sum(for_k.along, axis=0) - jnp.sum(for_q.along, axis=0)
        dlog_decay = _crossing(crossing, started, document)
    dq, dk = (_gathered(x.out, to) for x, to in ((for_q, q), (for_k, k)))
    return dq, dk, for_v.out, dlog_decay, for_v.state, for_k.sums


def _crossing(change: Array, started: Array, document: Array | None) -> Array:
    """Return what crosses each gate [B T H]: what the state brought, and all changes before.

    Nothing crosses the first gate of a document but the state's.
    """
    # The last change is that of what the state takes along undecayed, which dwarfs fast gates.
    before = jnp.cumsum(jnp.pad(change[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)
    if document is None:
        return before + started[:, None]
    number = jnp.arange(document.shape[1])
    changed = jnp.diff(document, axis=1, prepend=0) != 0
    first = lax.cummax(jnp.where(changed, number, 0), axis=1)
    before -= jnp.take_along_axis(before, first[:, :, None], axis=1)
    return before + jnp.where((document == 0)[:, :, None], started[:, None], 0.0)


def _if(log_decay: Array | None, x: Array) -> Array | None:
    """Return what a gate's gradient needs, if there are gates."""
    return None if log_decay is None else x


def _gathered(gradient: Array, to: Array) -> Array:
    """Add the gradients of heads that share an array."""
    shape = (*to.shape[:3], -1, to.shape[3])
    return jnp.sum(gradient.reshape(shape), axis=3, dtype=jnp.float32).astype(to.dtype)
