"""`sharded` computes what the op does, forward and gradients, on eight devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.dispatch import explain_all
from jaxmem.ops.leaky_average import init_leaky_state
from jaxmem.ops.linear_attention import init_linear_state
from jaxmem.ops.squared_attention import feature_count
from jaxmem.ops.weighted_average import init_weighted_state
from pallas_kernels._compat import make_mesh
from tests.helpers.compare import Budget, assert_close
from tests.helpers.linear_attention import functional

B, T, H, G, K = 4, 5, 4, 2, 4
IDS = jnp.asarray(np.repeat([[1, 1, 0, 2, 2], [3, 3, 3, 3, 3]], 2, axis=0), jnp.int32)
FIRST = IDS[:, 0]
ROUNDING = Budget(rtol=1e-5, atol=1e-5, rms=1e-6)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


HEADS, GROUPS = drawn(B, T, H, K), drawn(B, T, G, K)
GATES, PER_HEAD = -jnp.abs(drawn(B, T, H)), jnp.abs(drawn(H)) + 0.5
DOCUMENTS = {"segment_ids": IDS, "initial_segment": FIRST}
PLACES = jaxmem.Places(*(jnp.broadcast_to(jnp.arange(T), (B, T)),) * 2, IDS, IDS)
LINEAR = init_linear_state(B, H, K, K, with_total=True)
SQUARED = init_linear_state(B, H, feature_count(K), K, with_total=True)
TABLE = drawn(1, H, 3, K)
CALLS: dict[str, tuple[tuple[jax.Array, ...], dict[str, Any]]] = {
    "attention": (
        (HEADS, GROUPS, GROUPS),
        {"scale": PER_HEAD, "places": PLACES, "log_forget": GATES, "value_gate": -GATES},
    ),
    "attention_with_lse": ((HEADS, GROUPS, GROUPS), {"scale": PER_HEAD, "window": 3}),
    "gated_scan": (
        (drawn(B, T, K), -jnp.abs(drawn(B, T, K))),
        {"initial_state": drawn(B, K), **DOCUMENTS},
    ),
    "leaky_average": (
        (HEADS, PER_HEAD),
        {
            "scaling": "normalised",
            "initial_state": init_leaky_state(B, H, K, scaling="normalised"),
            **DOCUMENTS,
        },
    ),
    "linear_attention": (
        (GROUPS, GROUPS, HEADS),
        {"log_decay": GATES, "with_total": True, "initial_state": LINEAR, **DOCUMENTS},
    ),
    "persistent_read": ((HEADS, TABLE, TABLE), {"scale": PER_HEAD}),
    "polynomial_attention": (
        (HEADS, HEADS, HEADS),
        {"coefficients": drawn(3, H), "places": PLACES, "log_forget": GATES},
    ),
    "squared_attention": (
        (GROUPS, GROUPS, HEADS),
        {"log_decay": -PER_HEAD, "with_total": True, "initial_state": SQUARED, **DOCUMENTS},
    ),
    "weighted_average": (
        (HEADS, drawn(B, T, H, 1), -PER_HEAD[:, None]),
        {"bonus": drawn(H, K), "initial_state": init_weighted_state(B, H, K, weights=K)},
    ),
}


def mesh(rows: int, heads: int = 1) -> Any:
    return make_mesh((rows, heads), ("data", "tensor"), jax.devices()[: rows * heads])


def both(op: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return outputs and the gradients of all floating operands and options."""
    leaves, tree = jax.tree.flatten((operands, options))
    floating = {
        n: leaf
        for n, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def loss(floating: dict[int, Any]) -> tuple[Any, Any]:
        whole = [floating.get(n, leaf) for n, leaf in enumerate(leaves)]
        operands, options = jax.tree.unflatten(tree, whole)
        outputs = op(*operands, **options)
        return functional(jax.tree.map(jnp.sin, outputs)), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floating)
    return outputs, grads


def test_every_op_is_tried():
    ops = {line.partition(":")[0] for line in explain_all()}
    assert ops <= CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_it_equals_the_op(name: str):
    op, (operands, options) = getattr(jaxmem, name), CALLS[name]
    split = {"rows": "data"} if name == "gated_scan" else {"rows": "data", "heads": "tensor"}
    got = both(jaxmem.sharded(op, mesh(4, 2), **split), operands, options)
    expected = both(op, operands, options)
    assert type(got[0]) is type(expected[0])
    assert_close(got, expected, ROUNDING)


@pytest.mark.parametrize("name", ["linear_attention", "squared_attention"])
def test_kernels_run_in_it(name: str):
    """Over both axes at once, and over one of them."""
    op = getattr(jaxmem, name)
    operands = (GROUPS, GROUPS, HEADS)
    options = {"log_decay": GATES, "segment_ids": IDS, "interpret": True}
    split = jaxmem.sharded(op, mesh(2, 2), rows=("data", "tensor"))
    got = both(split, operands, {**options, "implementation": "pallas"})
    assert_close(got, both(op, operands, {**options, "implementation": "xla"}), ROUNDING)


def test_a_mesh_of_explicit_axes():
    """Those of `jax.make_mesh`, whether the arrays are there already or not."""
    explicit = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    op = jaxmem.sharded(jaxmem.attention, explicit, rows="data")
    run = jax.jit(jax.grad(lambda q: jnp.sum(jnp.sin(op(q, q, q, scale=0.5)))))
    placed = jax.device_put(HEADS, jax.NamedSharding(explicit, jax.P("data")))
    np.testing.assert_array_equal(run(HEADS), run(placed))


def test_devices_draw_other_masks():
    op = jaxmem.sharded(jaxmem.attention, mesh(4, 2), rows="data", heads="tensor")
    same = jnp.ones((B, T, H, K))
    options = {"scale": 1.0, "dropout": jaxmem.Dropout(0.5, jax.random.key(0))}
    y = np.asarray(jax.jit(lambda q: op(q, q, q, **options))(same))
    last = y[:, -1, :, 0].reshape(4, 2, 2)  # [rows, devices along heads, heads of a device]
    assert len(np.unique(last.reshape(8, 2), axis=0)) > 2  # with one key they would be alike


def test_what_does_not_fit_is_said():
    attention, gated = jaxmem.attention, jaxmem.gated_scan
    with pytest.raises(ConfigError, match=r"rows='data'"):
        jaxmem.sharded(attention, mesh(2))
    with pytest.raises(ConfigError, match=r"rows=\('batch',\).*It has data, tensor"):
        jaxmem.sharded(attention, mesh(2), rows="batch")
    with pytest.raises(ConfigError, match=r"different axes"):
        jaxmem.sharded(attention, mesh(2), rows="data", heads="data")
    with pytest.raises(ConfigError, match="no heads to split"):
        jaxmem.sharded(gated, mesh(2), rows="data", heads="tensor")
    by_rows = jaxmem.sharded(attention, mesh(8), rows="data")
    with pytest.raises(ShapeError, match=r"q has 4 rows.*8 devices of mesh axis data"):
        by_rows(HEADS, GROUPS, GROUPS, scale=1.0)
    by_heads = jaxmem.sharded(attention, mesh(1, 4), heads="tensor")
    with pytest.raises(ShapeError, match=r"k has 2 groups of heads.*4 devices"):
        by_heads(HEADS, GROUPS, GROUPS, scale=1.0)

    def unstated(q: Any) -> Any:
        return q

    with pytest.raises(ConfigError, match=r"what the axes of q are"):
        jaxmem.sharded(unstated, mesh(2), rows="data")(HEADS)
