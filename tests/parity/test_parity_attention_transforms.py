"""Attention and the persistent read under JAX's transformations, in plain JAX.

Forward mode, reverse mode and both of both; `vmap`, `shard_map` with its check, export with
symbolic sizes. What a form in plain JAX gives is compared with the reference under the same.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, export
from jax.sharding import PartitionSpec

from jaxmem.ops import attention_blocked, attention_xla, persistent_read_xla
from jaxmem.ops.attention import attention
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._compat import lower_for_cuda, make_mesh
from tests.helpers.compare import FORWARD, Budget, assert_close

SECOND = Budget(rtol=1e-4, atol=5e-5, rms=2e-5)
"""Of derivatives of the second order, which sum up more; 7e-6 rms measured."""
LENGTH = 21
SEGMENTS = jnp.asarray([[1] * 9 + [0] * 3 + [2] * 9] * 2)
Q, K, V = (jax.random.normal(jax.random.key(n), (2, LENGTH, 2, 4)) for n in range(3))
GATES = -jax.nn.softplus(jax.random.normal(jax.random.key(3), (2, LENGTH, 2)))
TABLES = jax.random.normal(jax.random.key(4), (2, 2, 11, 4))
PRIMALS = (Q, K, V, GATES)
TANGENTS = (V, Q, K, jnp.cos(GATES))


def plain(form: Any) -> Callable:
    return lambda q, k, v, gates: attention(q, k, v, log_forget=gates, implementation=form)


def packed(form: Any) -> Callable:
    """With all that a call may have; the gates of the values follow from those of time."""

    def call(q: Array, k: Array, v: Array, gates: Array) -> Array:
        options: dict[str, Any] = {"segment_ids": SEGMENTS[: len(q)], "clamp": 0.6, "lag": 1}
        options |= {"log_forget": gates, "value_gate": jnp.exp(gates), "window": 7}
        scale = 0.5 + jnp.mean(v, axis=(0, 1, 3)) ** 2
        return attention(q, k, v, scale=scale, implementation=form, **options)

    return call


def read(form: Any) -> Callable:
    def call(q: Array, k: Array, v: Array, gates: Array) -> Array:
        scale = 1.0 + jnp.mean(gates, axis=(0, 1)) ** 2
        keys, values = TABLES * (1.0 + k[0, 0, :, None]), TABLES * v[0, 0, :, None]
        return persistent_read(q, keys, values, scale=scale, implementation=form)

    return call


@pytest.fixture(params=["at once", "blocked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`xla` stands for two forms of each op, of few weights and of many."""
    blocked = request.param == "blocked"

    def fits_at_once(q: Array, k: Array) -> bool:
        del k
        return not (blocked and isinstance(q.shape[1], int))

    monkeypatch.setattr(attention_xla, "fits_at_once", fits_at_once)
    monkeypatch.setattr(attention_blocked, "block_of", lambda length: min(length, 8))
    if blocked:
        monkeypatch.setattr(persistent_read_xla, "WEIGHTS_LIMIT", 0)
    return "xla"


def loss(call: Callable) -> Callable:
    return lambda *primals: jnp.sum(jnp.sin(call(*primals)))


def derivatives(call: Callable) -> dict[str, Any]:
    every = (0, 1, 2, 3)
    gradient = jax.grad(loss(call), every)

    def slope(*primals: Array) -> Array:
        products = map(jnp.vdot, gradient(*primals), TANGENTS)
        return functools.reduce(jnp.add, products)

    def moved(*primals: Array) -> Array:
        return jnp.sum(jnp.sin(jax.jvp(call, primals, TANGENTS)[1]))

    def one(tangent: Array) -> Array:
        return jnp.sum(jax.jvp(call, PRIMALS, (tangent, *TANGENTS[1:]))[1])

    mapped = [jnp.stack([a, 0.5 * a]) for a in PRIMALS]
    return {
        "forward": jax.jvp(call, PRIMALS, TANGENTS),
        "reverse": gradient(*PRIMALS),
        "forward over reverse": jax.jvp(gradient, PRIMALS, TANGENTS)[1],
        "reverse over reverse": jax.grad(slope, every)(*PRIMALS),
        # Of values the tangent is linear here: nothing but rounding would be left.
        "reverse over forward": jax.grad(moved, (0, 1, 3))(*PRIMALS),
        "one tangent": jax.grad(lambda t: jnp.sum(jax.jvp(call, PRIMALS, (t, *TANGENTS[1:]))[1]))(
            Q
        ),
        "vmap": jax.vmap(gradient)(*mapped),
    }


@pytest.mark.parametrize("op", [packed, read])
def test_derivatives_of_all_kinds(form: str, op: Callable):
    found, expected = (jax.jit(lambda f=f: derivatives(op(f)))() for f in (form, "reference"))
    assert_close(found, expected, SECOND)


@pytest.mark.parametrize("op", [plain, packed])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_shard_map_with_its_check(form: str, op: Callable, implementation: str):
    """Rows on two devices; scan carries start as constants, which the check minds."""
    mesh, rows = make_mesh((2,), ("data",), jax.devices()[:2]), PartitionSpec("data")
    call = plain(implementation) if op is plain else one_row(implementation)
    spread = jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows)
    every = (0, 1, 2, 3)
    found, expected = (
        jax.jit(jax.value_and_grad(loss(f), every))(*PRIMALS) for f in (spread, call)
    )
    assert_close(found, expected, SECOND)


def one_row(form: Any) -> Callable:
    """As `packed`, without what mixes rows."""

    def call(q: Array, k: Array, v: Array, gates: Array) -> Array:
        options: dict[str, Any] = {"segment_ids": SEGMENTS[: len(q)], "clamp": 0.6}
        return attention(q, k, v, log_forget=gates, implementation=form, **options)

    return call


@pytest.mark.parametrize("sizes", ["b, 21", "b, t"])
@pytest.mark.parametrize("op", [plain, read])
def test_auto_is_exported_with_symbolic_sizes(op: Callable, sizes: str):
    """Named forms are exported by tests/unit/ops/test_transforms.py."""
    wide = export.symbolic_shape(f"{sizes}, 2, 4")
    shapes = [jax.ShapeDtypeStruct(wide[: a.ndim], jnp.float32) for a in PRIMALS]
    exported = export.export(jax.jit(op("auto")))(*shapes)
    assert_close(exported.call(*PRIMALS), op("reference")(*PRIMALS), FORWARD)


@pytest.mark.parametrize(("options", "pairs"), [({}, 36), ({"window": 9}, 15)], ids=str)
def test_a_gpu_runs_tiles_without_conditions(
    options: dict[str, Any], pairs: int, monkeypatch: pytest.MonkeyPatch
):
    """A condition in a loop is a round trip to the host; its length is known, too."""
    monkeypatch.setattr(attention_xla, "fits_at_once", lambda q, k: False)
    monkeypatch.setattr(attention_blocked, "block_of", lambda length: 8)
    shape = jax.ShapeDtypeStruct((1, 64, 2, 4), jnp.float32)

    def step(*arrays: Array) -> Any:
        call = functools.partial(attention, implementation="xla", **options)
        return jax.grad(loss(call), (0, 1, 2))(*arrays)

    text = lower_for_cuda(step, shape, shape, shape).as_text()
    assert not re.search(r"stablehlo\.(case|if)\b", text)
    # A third loop, over numbers of blocks alone, comes to nothing: XLA drops it.
    loops = re.findall(r"stablehlo\.while([^\n]*)(.*?)dense<(\d+)> : tensor<i32>", text, re.DOTALL)
    lengths = [int(length) for header, _, length in loops if "xf32" in header]
    assert lengths == [pairs, pairs], "of 64 pairs of blocks, forward and backward"
