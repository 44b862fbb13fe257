"""Squared attention where it reads a state: which implementation runs, and what cancels in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import KernelUnsupported
from jaxmem.mixers.base import build
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.nn.init import uniform_init
from jaxmem.ops.dispatch import explain, recording_choices
from jaxmem.ops.linear_attention import init_linear_state
from jaxmem.ops.squared_attention import SquaredOutput, feature_count, squared_attention
from jaxmem.reports.benchmark import baselines
from pallas_kernels._compat import stand_in_gpu
from tests.helpers.compare import GRADIENT, assert_close

HEADS, WIDTH = 2, 8
SCALE = 0.5


def empty(batch: int, dtype: Any = jnp.float32) -> Any:
    shape = (batch, HEADS, feature_count(WIDTH), WIDTH)
    return init_linear_state(*shape, with_total=True, dtype=dtype)


def test_with_a_state_auto_takes_chunks_and_the_kernel_raises():
    q = jnp.ones((1, 20, HEADS, WIDTH))
    options: dict[str, Any] = {"initial_state": empty(1), "with_total": True}
    with stand_in_gpu(), recording_choices() as choices:
        jax.eval_shape(lambda q: squared_attention(q, q, q, **options), q)
        explained = explain("squared_attention", q, q, q, **options)
        assert [explained] == choices
        assert explained.implementation == "xla"
        assert "with a state the recurrence runs" in explained.reason
        # The kernel reads rows without one.
        assert explain("squared_attention", q, q, q).implementation == "pallas"
        with pytest.raises(KernelUnsupported, match=r"'pallas': .*with a state.*xla, reference"):
            squared_attention(q, q, q, implementation="pallas", **options)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_names_stay_with_a_state(implementation: Any):
    q = jnp.ones((1, 3, HEADS, WIDTH))
    options = {"initial_state": empty(1), "with_total": True, "implementation": implementation}
    choice = explain("squared_attention", q, q, q, **options)
    assert (choice.implementation, choice.reason) == (implementation, "asked for by name")


def test_a_layer_on_the_kernel_decodes_and_reads_in_chunks():
    dim, length = HEADS * WIDTH, 9
    config = TwoMambaConfig(num_heads=HEADS, implementation="pallas", chunk_size=4)
    mixer = build(config, dim, init=uniform_init(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, length, dim))

    def loss(x: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        y = mixer(x, **options).y
        return jnp.sum(jnp.sin(y)), y

    def decoded(x: jax.Array) -> jax.Array:
        state, found = mixer.init_state(2), []
        for t in range(length):
            out = mixer.step(x[:, t], state)
            state = out.state
            found.append(out.y)
        return jnp.stack(found, axis=1)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="form")
    (_, wanted), wanted_grad = jax.value_and_grad(loss, has_aux=True)(x, implementation="xla")
    with recording_choices() as choices:
        (_, whole), grad = both(x)
    assert "pallas" in [c.implementation for c in choices]
    assert_close((whole, grad), (wanted, wanted_grad), GRADIENT)
    (_, chunked), grad = both(x, form="chunked")
    assert_close((chunked, grad), (wanted, wanted_grad), GRADIENT)
    assert_close(jax.jit(decoded)(x), wanted, GRADIENT)


def almost_orthogonal(length: int, share: float) -> tuple[Any, ...]:
    """Return queries that have this share of their norm along keys; gates are weak."""
    draw = np.random.default_rng(0)
    normal = np.linalg.qr(draw.normal(size=(WIDTH, WIDTH)))[0][0]
    rest = draw.normal(size=(2, 1, length, HEADS, WIDTH))
    rest -= np.sum(rest * normal, axis=-1, keepdims=True) * normal
    q, k = normal + share * rest[0], rest[1]
    v, gates = draw.normal(size=k.shape), -0.01 * draw.uniform(size=k.shape[:3])
    return tuple(np.float32(a).astype(np.float64) for a in (4.0 * q, k, v, gates))


def totals(q: Any, k: Any, gates: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of weights and the same with |q|² |k|² for (q·k)², in float64."""
    passed = np.moveaxis(np.cumsum(gates, axis=1), 1, 2)
    apart = passed[..., :, None] - passed[..., None, :]
    fade = np.exp(np.where(np.tri(q.shape[1], dtype=bool), apart, -np.inf))
    dots = np.einsum("bthk,bshk->bhts", q, k)
    lengths = np.sum(q**2, -1)[:, :, None] * np.sum(k**2, -1)[:, None]
    weights = fade * (SCALE * dots) ** 2, fade * SCALE**2 * np.moveaxis(lengths, 3, 1)
    total, bound = (np.moveaxis(w.sum(-1), 1, 2) for w in weights)
    return total, bound


@pytest.mark.parametrize("share", [1e-2, 1e-5])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_totals_that_cancel(implementation: Any, share: float):
    """They are as near to float64 as the docstring says, and never negative."""
    q, k, v, gates = almost_orthogonal(33, share)
    total, bound = totals(q, k, gates)
    narrow = tuple(jnp.asarray(a, jnp.float32) for a in (q, k, v, gates))

    def read(*operands: jax.Array) -> SquaredOutput:
        q, k, v, gates = operands
        options = {"scale": SCALE, "with_total": True, "chunk_size": 8}
        options |= {"initial_state": empty(1), "implementation": implementation}
        return squared_attention(q, k, v, log_decay=gates, **options)

    def loss(*operands: jax.Array) -> tuple[jax.Array, Any]:
        found: Any = read(*operands)
        return jnp.sum(jnp.sin(found.y)) + jnp.sum(found.total), found

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, found), grads = grad(*narrow)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((found, grads)))
    assert bool(jnp.all(found.total >= 0.0))
    eps = float(jnp.finfo(jnp.float32).eps)
    error = np.abs(np.asarray(found.total, np.float64) - total)
    assert np.max(error / bound) < 2.0 * eps
    # Relative to the total all pairs lose 1 / share of their digits, the recurrence its square.
    assert np.max(error / total) > 8.0 * eps / share
    pairs = squared_attention(*narrow[:3], scale=SCALE, log_decay=narrow[3], with_total=True)
    assert np.max(np.abs(np.asarray(pairs.total, np.float64) - total) / total) < 8.0 * eps / share


def test_a_negative_total_is_rounding_and_has_no_gradient():
    """With a state of none of its squares, which rounding alone could leave."""
    state = empty(1)
    state = state._replace(total=state.total.at[0, 0].set(-1.0).at[0, 1].set(1.0))
    q = jnp.zeros((1, 1, HEADS, WIDTH)).at[..., 0].set(1.0)

    def total(sums: jax.Array) -> Any:
        held = state._replace(total=sums)
        options = {"scale": 1.0, "with_total": True, "initial_state": held}
        return squared_attention(q, 0.0 * q, q, **options).total

    np.testing.assert_array_equal(total(state.total)[0, 0], [0.0, 1.0])
    grad = jax.grad(lambda sums: jnp.sum(total(sums)))(state.total)
    np.testing.assert_array_equal(jnp.sum(grad, axis=-1)[0], [0.0, 1.0])


def test_the_baselines_return_nothing_where_no_key_weighs():
    q = jnp.zeros((1, 4, HEADS, WIDTH))
    v, gates = jnp.ones_like(q), jnp.zeros((1, 4, HEADS))
    for form in (
        baselines.squared_by_pairs,
        lambda *operands: baselines.squared_by_chunks(*operands, chunk_size=2),
    ):
        y, pull = jax.vjp(form, q, v, v, gates)
        for leaf in jax.tree.leaves((y, pull(y + 1.0))):
            np.testing.assert_array_equal(leaf, 0.0)
