"""Backward pass of linear attention: three walks, from the inputs alone.

With p_ij = dy_i·v_j + dtotal_i and D_ij what the gates between j and i let through:
dq_i = scale Σ_j D_ij p_ij k_j, dk_j = scale Σ_i D_ij p_ij q_i and
dv_j = scale Σ_i D_ij (q_i·k_j) dy_i.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._compat import Precision
from pallas_kernels.linear_attention.launch import (
    LinearAttentionConfig,
    Operands,
    Outputs,
    find_config,
)
from pallas_kernels.linear_attention.walk import Inputs, Wanted, walk


def linear_backward(
    operands: Operands,
    grads: Outputs,
    *,
    scale: float,
    precision: Precision | None = None,
    config: LinearAttentionConfig | None = None,
    interpret: bool = False,
) -> Operands:
    """Return the gradients of what `linear_forward` takes; None for what is None or integers.

    Three walks (`walk.walk`): forwards with S for dq, in reverse with the gradient of S for dk and
    for dv. Each owns blocks of the width of its own result, so that no program adds to what another
    one writes. The gate at t gets what crosses it: what came before less what ended there plus what
    began, that is F_t = F_{t-1} + <k, dk>_{t-1} - <q, dq>_{t-1}, from the float32 accumulators and
    without what a token gives itself, which crosses no gate. Gradients of heads that share q and k
    are added in float32. FLOPs three times those of the forward pass; bytes 14 tensors of its 4,
    and those of dq and dk per head in float32 where heads share them. Not measured on a device yet.

    Args:
      operands: arrays of the forward pass.
      grads: cotangents of its outputs, dy in the dtype of y, the others float32.
      scale: factor of the result.
      precision: of float32 products.
      config: launch configuration; None takes that of the tables.
      interpret: run as plain JAX, for tests on CPU.
    """
    q, k, v, log_decay, document, memory, key_sum = operands
    config = config or find_config(q, k, v)
    run = functools.partial(
        walk, tiling=config.backward, scale=scale, precision=precision, interpret=interpret
    )
    through = (log_decay, document)
    heads_per_group = v.shape[2] // q.shape[2]
    dq = run(
        Inputs(grads.y, v, k, *through, memory, key_sum, grads.total, _if(log_decay, q)),
        name="linear_queries_gradient",
        dtype=q.dtype if heads_per_group == 1 else jnp.float32,
        wanted=Wanted(),
        transposed=True,
    )
    dk = run(
        Inputs(
            v, grads.y, q, *through, grads.memory, grads.key_sum, grads.total, _if(log_decay, k)
        ),
        name="linear_keys_gradient",
        dtype=k.dtype if heads_per_group == 1 else jnp.float32,
        wanted=Wanted(sums=key_sum is not None),
        reverse=True,
        transposed=True,
    )
    dv = run(
        Inputs(k, q, grads.y, *through, grads.memory),
        name="linear_values_gradient",
        dtype=v.dtype,
        wanted=Wanted(state=True),
        reverse=True,
    )
    dlog_decay = None
    if log_decay is not None:
        started = jnp.sum(dv.state * memory, axis=(2, 3))
        if key_sum is not None:
            started += jnp.sum(dk.sums * key_sum, axis=2)
        crossing = jnp.sum(dk.dot_with_multiplier, axis=0)
        crossing -= jnp.sum(dq.dot_with_multiplier, axis=0)
        dlog_decay = _crossing(crossing, started, document)
    per_group = [_summed_over_heads(a.out, to) for a, to in ((dq, q), (dk, k))]
    return Operands(per_group[0], per_group[1], dv.out, dlog_decay, None, dv.state, dk.sums)


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


def _summed_over_heads(gradient: Array, to: Array) -> Array:
    """Add the gradients of heads that share an array."""
    shape = (*to.shape[:3], -1, to.shape[3])
    return jnp.sum(gradient.reshape(shape), axis=3, dtype=jnp.float32).astype(to.dtype)
