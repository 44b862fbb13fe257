"""Squared attention where it reads a state: which implementation runs, and what cancels in it."""

import functools
from collections.abc import Callable
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
from jaxmem.ops.linear_attention import LinearState
from jaxmem.ops.squared_attention import SquaredOutput, feature_count, squared_attention
from jaxmem.reports.benchmark import baselines
from pallas_kernels._compat import stand_in_gpu
from tests.helpers.compare import GRADIENT, assert_close
from tests.helpers.drawn import drawn

HEADS, WIDTH = 2, 8
SCALE = 0.5


def empty(batch: int) -> LinearState:
    shape = (batch, HEADS, feature_count(WIDTH), WIDTH)
    return LinearState(np.zeros(shape, np.float32), np.zeros(shape[:3], np.float32))


def test_with_a_state_auto_takes_chunks_and_the_kernel_raises():
    q = np.ones((1, 20, HEADS, WIDTH), np.float32)
    options: dict[str, Any] = {"initial_state": empty(1), "with_total": True}

    def trace(**named: Any) -> None:
        def call(q: Any, state: LinearState) -> SquaredOutput:
            return squared_attention(q, q, q, **options | named | {"initial_state": state})

        jax.eval_shape(call, q, options["initial_state"])

    with stand_in_gpu(), recording_choices() as choices:
        trace()
        explained = explain("squared_attention", q, q, q, **options)
        assert [explained] == choices
        assert explained.implementation == "xla"
        assert "with a state the recurrence runs" in explained.reason
        # The kernel reads rows without one.
        assert explain("squared_attention", q, q, q).implementation == "pallas"
        with pytest.raises(KernelUnsupported, match=r"'pallas': .*with a state.*xla, reference"):
            trace(implementation="pallas")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_names_stay_with_a_state(implementation: Any):
    q = np.ones((1, 3, HEADS, WIDTH), np.float32)
    options = {"initial_state": empty(1), "with_total": True, "implementation": implementation}
    choice = explain("squared_attention", q, q, q, **options)
    assert (choice.implementation, choice.reason) == (implementation, "asked for by name")


def test_a_layer_on_the_kernel_decodes_and_reads_in_chunks():
    dim, length = HEADS * WIDTH, 9
    config = TwoMambaConfig(num_heads=HEADS, implementation="pallas", chunk_size=4)
    made = drawn(lambda: build(config, dim, init=uniform_init(), rngs=nnx.Rngs(0)), spread=0.2)
    graph, weights = nnx.split(made)
    x = np.float32(np.random.default_rng(1).normal(size=(2, length, dim)))

    @functools.partial(jax.jit, static_argnames=("form", "implementation"))
    def both(weights: Any, x: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, weights)(x, **options).y
            return jnp.sum(jnp.sin(y)), y

        (_, y), grad = jax.value_and_grad(loss, has_aux=True)(x)
        return y, grad

    @jax.jit
    def decoded(weights: Any, x: jax.Array) -> jax.Array:
        mixer = nnx.merge(graph, weights)

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            out = mixer.step(x, state)
            return out.state, out.y

        return jax.lax.scan(step, mixer.init_state(2), jnp.moveaxis(x, 1, 0))[1]

    expected = both(weights, x, implementation="xla")
    with recording_choices() as choices:
        whole = both(weights, x)
    assert "pallas" in [c.implementation for c in choices]
    assert_close(whole, expected, GRADIENT)
    assert_close(both(weights, x, form="chunked"), expected, GRADIENT)
    assert_close(np.moveaxis(decoded(weights, x), 0, 1), np.asarray(expected[0]), GRADIENT)


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


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_totals_that_cancel(implementation: Any):
    """They are as near to float64 as the docstring says, and never negative."""

    def read(rows: tuple[jax.Array, ...], **options: Any) -> SquaredOutput:
        q, k, v, gates = rows
        options |= {"scale": SCALE, "log_decay": gates, "with_total": True}
        return squared_attention(q, k, v, **options)

    @jax.jit
    def both(rows: tuple[jax.Array, ...], state: LinearState) -> Any:
        def loss(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            options = {"initial_state": state, "implementation": implementation}
            found: Any = read(rows, chunk_size=8, **options)
            return jnp.sum(jnp.sin(found.y)) + jnp.sum(found.total), found

        return jax.value_and_grad(loss, has_aux=True)(rows)

    pairs = jax.jit(lambda rows: read(rows).total)
    eps = float(np.finfo(np.float32).eps)
    for share in (1e-2, 1e-5):
        rows = almost_orthogonal(33, share)
        total, bound = totals(rows[0], rows[1], rows[3])
        narrow = jax.tree.map(np.float32, rows)
        (_, found), grads = jax.tree.map(np.asarray, both(narrow, empty(1)))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((found, grads)))
        assert np.all(found.total >= 0.0)
        error = np.abs(np.float64(found.total) - total)
        assert np.max(error / bound) < 2.0 * eps
        # Relative to the total all pairs lose 1 / share of their digits, the recurrence its square.
        assert np.max(error / total) > 8.0 * eps / share
        error = np.abs(np.float64(pairs(narrow)) - total)
        assert np.max(error / total) < 8.0 * eps / share


def test_a_negative_total_is_rounding_and_has_no_gradient():
    """With a state of none of its squares, which rounding alone could leave."""
    state = empty(1)
    state.total[0, 0], state.total[0, 1] = -1.0, 1.0
    q = np.zeros((1, 1, HEADS, WIDTH), np.float32)
    q[..., 0] = 1.0

    @jax.jit
    def both(q: jax.Array, state: LinearState) -> tuple[jax.Array, jax.Array]:
        def loss(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = {"scale": 1.0, "with_total": True}
            held = state._replace(total=sums)
            total: Any = squared_attention(q, 0.0 * q, q, initial_state=held, **options).total
            return jnp.sum(total), total

        (_, total), grad = jax.value_and_grad(loss, has_aux=True)(state.total)
        return total, grad

    total, grad = jax.tree.map(np.asarray, both(q, state))
    np.testing.assert_array_equal(total[0, 0], [0.0, 1.0])
    np.testing.assert_array_equal(np.sum(grad, axis=-1)[0], [0.0, 1.0])


def test_the_baselines_return_nothing_where_no_key_weighs():
    q = np.zeros((1, 4, HEADS, WIDTH), np.float32)
    v, gates = np.ones_like(q), np.zeros((1, 4, HEADS), np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(form: Callable[..., jax.Array], *rows: jax.Array) -> Any:
        y, pull = jax.vjp(form, *rows)
        return y, pull(y + 1.0)

    for form in (
        baselines.squared_by_pairs,
        functools.partial(baselines.squared_by_chunks, chunk_size=2),
    ):
        for leaf in jax.tree.leaves(both(form, q, v, v, gates)):
            np.testing.assert_array_equal(leaf, 0.0)
