"""What people write without a special op: measured beside the implementations."""

import warnings

import jax
import jax.numpy as jnp
from jax import Array, lax


def scan_by_pairs(a: Array, b: Array) -> Array:
    """h_t = a_t h_{t-1} + b_t over axis 1 by `lax.associative_scan`, in float32."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    wide = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.associative_scan(join, wide, axis=1)[1].astype(b.dtype)


def gated_scan_by_pairs(x: Array, log_decay: Array) -> Array:
    """Gated scan of x, log_decay [B T D] by `lax.associative_scan`."""
    return scan_by_pairs(jnp.exp(log_decay.astype(jnp.float32)), x)


def leaky_average_by_pairs(x: Array, rate: Array) -> Array:
    """Leaky average of x [B T H K] by `lax.associative_scan`."""
    decay = jnp.broadcast_to(jnp.exp(-rate)[:, None], x.shape)
    return scan_by_pairs(decay, x)


def leaky_average_by_matrix(x: Array, rate: Array) -> Array:
    """Leaky average of x [B T H K] as a product with the matrix exp(-rate (i - j)), i >= j.

    The form of the authors' regular variant: a (H, T, T) matrix per call, quadratic in T.

    Reference: Memory Mosaics (Library, regular), nanoMosaics `LeakyAvg`.
    """
    places = jnp.arange(x.shape[1])
    behind = places[:, None] - places[None, :]
    decays = jnp.exp(-jnp.maximum(behind, 0) * rate[:, None, None])
    weights = jnp.where(behind >= 0, decays, 0.0).astype(x.dtype)
    return jnp.einsum("hij,bjhk->bihk", weights, x)


def weighted_average_by_pairs(values: Array, log_weight: Array, log_decay: Array) -> Array:
    """Weighted average of values [B T H V] as a quotient of sums by `lax.associative_scan`.

    Without a running maximum: only weights whose exponentials fit float32.
    """
    decay, weight = (jnp.exp(a.astype(jnp.float32)) for a in (log_decay, log_weight))
    total = scan_by_pairs(jnp.broadcast_to(decay, values.shape), weight * values)
    return (total / scan_by_pairs(decay, weight)).astype(values.dtype)


def jax_attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention by `jax.nn.dot_product_attention` in plain XLA."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def jax_kernel_attention(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Causal attention by JAX's own Pallas kernel, launched through Triton as ours is.

    Raises:
      ImportError: this JAX has no such kernel any more.
      ValueError: the length is not a multiple of its tiles.
    """
    with warnings.catch_warnings():
        # JAX names another package as its successor; until it is gone it is the nearest peer.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    scale = q.shape[-1] ** -0.5
    return mha(q, k, v, None, sm_scale=scale, causal=True, interpret=interpret)
