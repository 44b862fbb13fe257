"""The kernels of the persistent read, interpreted, against softmax in float64 written directly.

Every pair of what a call may have occurs in one of these calls: banks, dropout, half precision,
widths that are no powers of two; and queries (batch x length) and pairs that are one, one less than
a tile, a tile, one more, several and some.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmem.errors import KernelUnsupported
from jaxmem.ops.attention import Dropout
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._compat import make_mesh
from pallas_kernels.persistent_read.launch import splits
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close
from tests.helpers.persistent_read import (
    TILES,
    Inputs,
    Size,
    check_scales,
    direct,
    factors,
    inputs,
    run,
    value_and_grads,
)

ONE_BANK = Size(length=40, pairs=53)


def test_an_error_is_no_more_than_a_scale_costs():
    check_scales(ONE_BANK, "pallas")


def test_logits_of_order_one():
    args = inputs(ONE_BANK)
    (y, grads), (wanted, wanted_grads) = run(args, "pallas"), direct(args)
    assert_close(y, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


def test_dropout_and_shares_of_the_queries():
    size = Size(batch=3, length=50, banks=3, pairs=53, width=40, value_width=24)
    assert splits(tables=6, pairs=53, rows=150, config=TILES) == 2
    args, dropout = inputs(size), Dropout(0.4, jax.random.key(7))
    y, grads = run(args, "pallas", dropout)
    wanted, wanted_grads = direct(args, factors(size, dropout))
    assert_close(y, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


@pytest.mark.parametrize(
    "size",
    # Wide tiles are not square: 32 queries by 16 pairs in the backward kernels.
    [
        Size(batch=1, length=1, pairs=1),
        Size(batch=1, length=37, banks=2, width=128, value_width=96),
    ],
    ids=["one", "wide"],
)
def test_default_tiles(size: Size):
    args = inputs(size)
    # Logits of one size at every width.
    args = args._replace(scale=np.float32(args.scale * (16 / size.width) ** 0.5))
    y, grads = run(args, "pallas", config=None)
    wanted, wanted_grads = direct(args)
    assert_close(y, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


@pytest.mark.parametrize(
    ("dtypes", "size"),
    [
        (
            (jnp.bfloat16, jnp.bfloat16),
            Size(batch=1, length=15, pairs=17, width=40, value_width=80),
        ),
        (
            (jnp.float16, jnp.float16),
            Size(batch=1, length=17, pairs=15, banks=2, width=80, value_width=24),
        ),
        ((jnp.float32, jnp.bfloat16), Size(batch=2, length=8, pairs=16)),
    ],
    ids=["bfloat16", "float16", "float32-queries"],
)
def test_half_precision(dtypes: Any, size: Size):
    args = inputs(size, dtypes)
    args = args._replace(scale=np.float32(args.scale * (16 / size.width) ** 0.5))
    y, grads = run(args, "pallas")
    assert y.dtype == grads.values.dtype == dtypes[1]
    assert grads.q.dtype == grads.keys.dtype == dtypes[0]
    wanted, wanted_grads = direct(args)
    assert_close(y, wanted, BFLOAT16)
    assert_close(grads, wanted_grads, BFLOAT16)


def test_transformations():
    """Kernels compute the same within shard_map, scan, checkpoint and vmap, one in the other."""
    args = inputs(Size(batch=8))

    def spread(args: Inputs) -> jax.Array:
        q, keys, values, scale = args
        options: Any = {"scale": scale, "implementation": "pallas", "config": TILES}

        def scanned(q: jax.Array) -> jax.Array:
            read = jax.checkpoint(jax.vmap(lambda q: persistent_read(q, keys, values, **options)))
            pairs = q.reshape(2, 2, 1, *q.shape[1:])
            return jax.lax.scan(lambda _, q: (None, read(q)), None, pairs)[1].reshape(q.shape)

        mesh = make_mesh((2,), ("data",), jax.devices()[:2])
        rows = PartitionSpec("data")
        return jax.shard_map(scanned, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(q)

    y, grads = jax.jit(value_and_grads(spread))(args)
    wanted, wanted_grads = direct(args)
    assert_close(y, wanted, FORWARD)
    assert_close(grads, wanted_grads, GRADIENT)


@pytest.mark.parametrize("order", ["backward", "forward"])
def test_second_derivative_says_what_to_do(order: str):
    args = inputs(Size())

    def loss(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(persistent_read(q, keys, values, implementation="pallas")))

    grad = jax.grad(loss)
    if order == "backward":
        twice = jax.grad(lambda *args: jnp.sum(grad(*args)))
    else:
        twice = jax.jacfwd(grad)
    with pytest.raises(KernelUnsupported, match=r"persistent_read .* Use implementation='xla'"):
        jax.eval_shape(twice, *args[:3])
