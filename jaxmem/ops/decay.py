"""Decays that may be growth: bring them below 1 where only ratios of weights matter."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxmem.ops.platforms import on_cpu_or_elsewhere
from jaxmem.shapes import Valid
from pallas_kernels._compat import vary_like


def bounded_decay(
    log_decay: Float[Array, "B T H"],
    start: Float[Array, "B H"],
    resets: Valid | None,
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    r"""Return decays g' <= 0 and excesses u >= 0 that give the same normalised weights.

    u_t = max(u_{t-1} + g_t, 0),  g'_t = g_t - u_t + u_{t-1}

    The weight of key j at query t is e^{g_{j+1} + ... + g_t} = e^{u_t} e^{-u_j} e^{g'_{j+1} + ...},
    so that keys weighed by e^{-u_j} and decays g' change all weights of a query by one factor,
    which normalisation takes out again. No gradient flows through u, for the same reason.

    Args:
      log_decay: g, of any sign.
      start: u before the first token.
      resets: tokens that start a document, where u starts anew; None: none.
    """
    resets = jnp.zeros(log_decay.shape[:2], bool) if resets is None else resets
    wide = lax.stop_gradient(log_decay)
    shift = jnp.where(resets[..., None], -jnp.inf, wide)  # a reset forgets u
    start = vary_like(start, shift)
    elsewhere = _tree if isinstance(wide.shape[1], int) else _steps  # a tree has a known height
    excess = on_cpu_or_elsewhere(_steps, elsewhere, shift, start)
    before = jnp.concatenate([start[:, None], excess[:, :-1]], axis=1)
    before = jnp.where(resets[..., None], 0.0, before)
    return log_decay - excess + before, excess


def _steps(shift: Array, start: Array) -> Array:
    """Return u of every token: on a CPU a scan is a plain loop."""

    def step(u: Array, shift_t: Array) -> tuple[Array, Array]:
        u = jnp.maximum(u + shift_t, 0.0)
        return u, u

    return jnp.moveaxis(lax.scan(step, start, jnp.moveaxis(shift, 1, 0))[1], 0, 1)


def _tree(shift: Array, start: Array) -> Array:
    """Return u of every token in log T levels: max(u + s, m) composes to such a function again."""
    sums, floors = lax.associative_scan(_join, (shift, jnp.zeros_like(shift)), axis=1)
    return jnp.maximum(start[:, None] + sums, floors)


def _join(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
    """Compose u -> max(u + s, m) and u -> max(u + s', m')."""
    return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])
