"""Attention and the persistent read under JAX's transformations, in plain JAX.

Forward mode, reverse mode and both of both; `vmap`, `shard_map` with its check; export with
symbolic sizes. tests/unit/ops/test_transforms.py tries most of these with every op; here are the
walk over tiles with all that a call may have, and forward mode inside reverse mode.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export
from jax.sharding import PartitionSpec

from jaxmem.ops import attention_blocked, attention_xla, persistent_read_xla
from jaxmem.ops.attention import attention
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._compat import lower_for_cuda, make_mesh
from tests.helpers import attention as attentions
from tests.helpers import persistent_read as reads
from tests.helpers.compare import FORWARD, Budget, assert_close

SECOND = Budget(rtol=1e-4, atol=5e-5, rms=2e-5)
"""Of derivatives of the second order, which sum up more; 7e-6 rms measured."""
SEGMENTS = [[1] * 9 + [0] * 3 + [2] * 9] * 2

Operands = tuple[Any, ...]


def packed(implementation: Any, q: Array, k: Array, v: Array, gates: Array) -> Array:
    """With all that a call may have; the gates of the values follow from those of time."""
    options: dict[str, Any] = {"segment_ids": jnp.asarray(SEGMENTS), "clamp": 0.6, "lag": 1}
    options |= {"log_forget": gates, "value_gate": jnp.exp(gates), "window": 7}
    scale = 0.5 + jnp.mean(v, axis=(0, 1, 3)) ** 2
    return attention(q, k, v, scale=scale, implementation=implementation, **options)


def read(implementation: Any, q: Array, keys: Array, values: Array, scale: Array) -> Array:
    return persistent_read(q, keys, values, scale=scale, implementation=implementation)


def operands(op: Callable) -> Operands:
    if op is packed:
        size = attentions.Size(length=21, width=4, value_width=4)
        q, k, v, _, gates, _ = attentions.inputs(size, gated=True)
        return q, k, v, gates
    # More than 128 queries, so that there are two blocks of them.
    return reads.inputs(reads.Size(length=70, pairs=11, width=4, value_width=4))


def loss(call: Callable) -> Callable:
    return lambda *primals: jnp.sum(jnp.sin(call(*primals)))


def gradient_and_tangent(call: Callable, primals: Operands, tangents: Operands) -> Any:
    every = tuple(range(len(primals)))
    return jax.jvp(jax.grad(loss(call), every), primals, tangents)


def derivatives(call: Callable, primals: Operands, tangents: Operands) -> dict[str, Any]:
    """Return first and second derivatives of the loss in every order of modes.

    The gradient also under `vmap`, of two calls at once.
    """
    every = tuple(range(len(primals)))
    scalar = jax.jit(loss(call))
    gradient = jax.jit(jax.grad(scalar, every))

    @jax.jit
    def slope(*primals: Array, tangents: Operands) -> Array:
        return jax.jvp(scalar, primals, tangents)[1]

    def along(*primals: Array) -> Array:
        return functools.reduce(jnp.add, map(jnp.vdot, gradient(*primals), tangents))

    reverse, tangent = jax.jvp(gradient, primals, tangents)
    return {
        "forward": slope(*primals, tangents=tangents),
        "reverse": reverse,
        "forward over reverse": tangent,
        "reverse over reverse": jax.grad(along, every)(*primals),
        "reverse over forward": jax.grad(slope, every)(*primals, tangents=tangents),
        "vmap": jax.vmap(gradient)(*(jnp.stack([a, 0.5 * a]) for a in primals)),
        "one tangent": jax.grad(lambda t: slope(*primals, tangents=(t, *tangents[1:])))(
            tangents[0]
        ),
    }


@pytest.mark.parametrize(
    ("op", "form"), [(packed, "at once"), (packed, "blocked"), (read, "at once"), (read, "blocked")]
)
def test_derivatives_of_all_kinds(op: Callable, form: str):
    primals = operands(op)
    tangents = tuple(np.float32(np.cos(np.arange(a.size))).reshape(a.shape) for a in primals)

    @jax.jit
    def every(*primals: Array) -> dict[str, Any]:
        with attentions.forced(form) as named, pytest.MonkeyPatch.context() as patch:
            if form == "blocked":
                patch.setattr(persistent_read_xla, "WEIGHTS_LIMIT", 0)
            return derivatives(functools.partial(op, named["implementation"]), primals, tangents)

    found = jax.tree.map(np.asarray, every(*primals))
    expected, moved = reference(op)(primals, tangents)
    slope = sum(np.vdot(a, b) for a, b in zip(expected, tangents, strict=True))
    assert_close(found["reverse"], expected, SECOND)
    assert_close(found["forward"], slope, SECOND)
    assert_close(found["one tangent"], expected[0], SECOND)
    for name in ("forward over reverse", "reverse over reverse", "reverse over forward"):
        assert_close(found[name], moved, SECOND)
    of_halves, _ = reference(op)([np.float32(0.5) * a for a in primals], tangents)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), expected, of_halves)
    assert_close(found["vmap"], both, SECOND)


@functools.cache
def reference(op: Callable) -> Callable:
    """Return the gradient of the reference and the tangent of this gradient."""
    call = functools.partial(op, "reference")
    return jax.jit(lambda primals, tangents: gradient_and_tangent(call, tuple(primals), tangents))


@pytest.mark.parametrize("form", attentions.PLAIN)
def test_shard_map_with_its_check(form: str):
    """Rows on two devices; scan carries start as constants, which the check minds."""
    size = attentions.Size(length=21, width=4, value_width=4)
    args = attentions.inputs(size, gated=True)

    rows, mesh = PartitionSpec("data"), make_mesh((2,), ("data",), jax.devices()[:2])

    @jax.jit
    def both(args: attentions.Inputs, segments: Array) -> Any:
        def spread(args: attentions.Inputs) -> attentions.Outputs:
            q, k, v, scale, gates, _ = args

            def call(q: Array, k: Array, v: Array, gates: Array, segments: Array) -> Any:
                mine = attentions.Inputs(q, k, v, scale, gates)
                return attentions.read(mine, {"segment_ids": segments}, clamp=0.6, **named)

            sharded = jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows)
            return sharded(q, k, v, gates, segments)

        with attentions.forced(form) as named:
            return attentions.value_and_grads(spread)(args, 1.0)

    found = both(args, np.array(SEGMENTS))
    visible = attentions.rows_visible(size, segments=SEGMENTS)
    attentions.check(found, attentions.direct(args, visible, clamp=0.6))


SIZES = pytest.mark.parametrize("sizes", ["b, 21", "b, t"])


@SIZES
def test_automatic_attention_is_exported_with_symbolic_sizes(sizes: str):
    """Named forms are exported by tests/unit/ops/test_transforms.py."""
    size = attentions.Size(length=21, width=4, value_width=4)
    q, k, v, scale, gates, _ = attentions.inputs(size, gated=True)

    def call(q: Array, k: Array, v: Array, gates: Array) -> Array:
        return attention(q, k, v, scale=jnp.asarray(scale), log_forget=gates)

    found = exported(call, sizes, q, k, v, gates)
    args = attentions.Inputs(q, k, v, scale, gates)
    (expected, _), _ = attentions.direct(args, attentions.rows_visible(size))
    assert_close(found, expected, FORWARD)


@SIZES
def test_an_automatic_read_is_exported_with_symbolic_sizes(sizes: str):
    args = reads.inputs(reads.Size(length=21, pairs=11, width=4, value_width=4))
    keys, values, scale = map(jnp.asarray, args[1:])
    found = exported(lambda q: persistent_read(q, keys, values, scale=scale), sizes, args.q)
    assert_close(found, reads.direct(args)[0], FORWARD)


def exported(call: Callable, sizes: str, *arrays: Any) -> Array:
    """Export a call for any sizes and call that with arrays."""
    wide = export.symbolic_shape(f"{sizes}, 2, 4")
    shapes = [jax.ShapeDtypeStruct(wide[: a.ndim], jnp.float32) for a in arrays]
    return export.export(jax.jit(call))(*shapes).call(*arrays)


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
