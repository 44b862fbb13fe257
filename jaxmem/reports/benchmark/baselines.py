"""What people write without a special op, and single forms of ops that choose between several."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmem.ops.attention_terms import cumulative
from jaxmem.ops.linear_attention import init_linear_state
from jaxmem.ops.similarity import Pairs, similarity_sums
from jaxmem.ops.squared_attention import SquaredOutput, feature_count, squared_attention
from pallas_kernels.pairs import Decay


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


def linear_by_matrix(q: Array, k: Array, v: Array, log_decay: Array | float = 0.0) -> Array:
    """Linear attention as a product with the matrix of its weights, quadratic in T.

    The form of the authors' kernels; q, k [B T G K], v [B T H V], decays [B T H], [H] or none.
    """
    share = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, share, axis=2), jnp.repeat(k, share, axis=2)
    gates = jnp.broadcast_to(jnp.asarray(log_decay, jnp.float32), v.shape[:3])
    decays = _decays(jnp.moveaxis(jnp.cumsum(gates, axis=1), 2, 1))
    weights = jnp.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5 * decays
    return jnp.einsum("bhij,bjhv->bihv", weights.astype(v.dtype), v)


def linear_by_chunks(q: Array, k: Array, v: Array, log_decay: Array, *, chunk_size: int) -> Array:
    """Linear attention of as many heads of keys as of values, by a checkpointed scan over chunks.

    Nothing but the formula, for rows that chunks divide: no documents, groups, totals or states.
    """
    batch, length, heads, width = q.shape
    size = min(chunk_size, length)

    def cut(a: Array) -> Array:  # [B T H ...] to [N B H C ...]
        a = a.astype(jnp.float32).reshape(batch, -1, size, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))

    @jax.checkpoint
    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, gates = chunk
        passed = jnp.cumsum(gates, axis=-1)
        weights = jnp.einsum("bhik,bhjk->bhij", q, k) * _decays(passed)
        before = jnp.einsum("bhik,bhkv->bhiv", q, state)
        y = jnp.einsum("bhij,bhjv->bhiv", weights, v) + jnp.exp(passed)[..., None] * before
        k = k * jnp.exp(passed[..., -1:] - passed)[..., None]
        state = jnp.exp(passed[..., -1])[..., None, None] * state
        return state + jnp.einsum("bhjk,bhjv->bhkv", k, v), y

    start = jnp.zeros((batch, heads, width, v.shape[-1]), jnp.float32)
    rows = (q * width**-0.5, k, v, log_decay)
    _, y = lax.scan(step, start, tuple(cut(a) for a in rows))
    return jnp.moveaxis(y, (0, 3), (1, 2)).reshape(v.shape).astype(v.dtype)


def _decays(passed: Array) -> Array:
    """Return e^{passed_i - passed_j} for i >= j, else 0, of sums [... T]."""
    seen = jnp.tril(jnp.ones((passed.shape[-1],) * 2, bool))
    return jnp.exp(jnp.where(seen, passed[..., :, None] - passed[..., None, :], -jnp.inf))


def squared_by_pairs(q: Array, k: Array, v: Array, log_decay: Array) -> Array:
    """Our squared attention over all pairs, whatever the length; normalised."""
    sums = tuple(jnp.moveaxis(a, 1, 2) for a in cumulative(log_decay.astype(jnp.float32)))
    pairs = Pairs(q, k, v, Decay(*sums, *sums), None)
    y, total = similarity_sums(
        jnp.square, pairs, scale=q.shape[-1] ** -0.5, precision=None, in_row=True
    )
    return _divided(y, total).astype(v.dtype)


def normalised(read: SquaredOutput) -> Array:
    """Return the mean of the values from the sums that a call with totals returns."""
    total: Any = read.total
    return _divided(read.y, total)


def _divided(y: Array, total: Array) -> Array:
    """Return y over the sums of weights, 0 where these are 0, as the layers do."""
    some = total != 0.0
    return jnp.where(some[..., None], y, 0.0) / jnp.where(some, total, 1.0)[..., None]


def squared_by_chunks(q: Array, k: Array, v: Array, log_decay: Array, *, chunk_size: int) -> Array:
    """Our squared attention in chunks, whatever the length; normalised."""
    shape = (v.shape[0], v.shape[2], feature_count(q.shape[3]), v.shape[3])
    read = squared_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        with_total=True,
        # With a state it takes chunks.
        initial_state=init_linear_state(*shape, with_total=True),
        implementation="xla",
        chunk_size=chunk_size,
    )
    return normalised(read).astype(v.dtype)


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
