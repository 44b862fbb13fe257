"""The kernels of the persistent read, interpreted, against softmax in float64 written directly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported
from jaxmem.ops import persistent_read_xla as xla
from jaxmem.ops.attention import Dropout
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.persistent_read import persistent_read
from pallas_kernels._compat import make_mesh
from pallas_kernels._dropout import dropout_seed, kept
from pallas_kernels.persistent_read import Operands, PersistentReadConfig
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close

TILES = PersistentReadConfig(
    block_rows=16,
    block_pairs=16,
    num_warps=4,
    num_stages=2,
    backward_rows=16,
    backward_pairs=16,
    backward_warps=4,
    backward_stages=2,
)
"""Small enough that few queries and pairs make several tiles."""


class Inputs(NamedTuple):
    q: Any
    keys: Any
    values: Any
    scale: Any


class Size(NamedTuple):
    batch: int = 2
    length: int = 9
    heads: int = 2
    banks: int = 1
    pairs: int = 21
    width: int = 16
    value_width: int = 16


def inputs(size: Size, dtype: Any = jnp.float32) -> Inputs:
    shapes = (
        (size.batch, size.length, size.heads, size.width),
        (size.banks, size.heads, size.pairs, size.width),
        (size.banks, size.heads, size.pairs, size.value_width),
    )
    arrays = [jax.random.normal(jax.random.key(n), s, dtype) for n, s in enumerate(shapes)]
    return Inputs(*arrays, scale=jnp.linspace(0.3, 1.5, size.heads))


def direct(args: Inputs, factors: np.ndarray | float = 1.0) -> tuple[np.ndarray, Inputs]:
    """Return the read and the gradients of Σ cos(n) y_n by their formulas, in float64."""
    q, keys, values, scale = (np.asarray(a, np.float64) for a in args)
    dots = np.einsum("bthk,rhpk->rbthp", q, keys)
    logits = dots * scale[:, None]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("rbthp,rhpv->bthv", weights * factors, values) / len(keys)
    grad = np.cos(np.arange(y.size)).reshape(y.shape) / len(keys)
    weight_grad = np.einsum("bthv,rhpv->rbthp", grad, values) * factors
    inner = np.sum(weights * weight_grad, axis=-1, keepdims=True)
    logit_grad = weights * (weight_grad - inner)
    return y, Inputs(
        np.einsum("rbthp,rhpk,h->bthk", logit_grad, keys, scale),
        np.einsum("rbthp,bthk,h->rhpk", logit_grad, q, scale),
        np.einsum("rbthp,bthv->rhpv", weights * factors, grad),
        np.einsum("rbthp,rbthp->h", logit_grad, dots),
    )


def run(args: Inputs, **options: Any) -> tuple[jax.Array, Inputs]:
    @jax.jit
    def both(args: Inputs) -> Any:
        def scalar(args: Inputs) -> tuple[jax.Array, jax.Array]:
            y = persistent_read(*args[:3], scale=args.scale, **options)
            return jnp.sum(y.astype(jnp.float32).ravel() * jnp.cos(jnp.arange(y.size))), y

        return jax.value_and_grad(scalar, has_aux=True)(args)

    (_, y), grads = both(args)
    return y, grads


def check(args: Inputs, factors: np.ndarray | float = 1.0, **options: Any) -> None:
    y, grads = run(args, **options)
    expected, expected_grads = direct(args, factors)
    assert_close(y, expected, FORWARD)
    assert_close(grads, expected_grads, GRADIENT)


# Queries (batch x length) and pairs: one, one less than a tile, a tile, one more, several and some.
@pytest.mark.parametrize(
    "size",
    [
        Size(batch=1, length=1, pairs=1),
        Size(batch=1, length=15, pairs=17),
        Size(batch=2, length=8, pairs=16),
        Size(batch=1, length=17, pairs=15),
        Size(batch=3, length=50, pairs=53, banks=3),  # shares of the queries too
        Size(width=40, value_width=80, pairs=5),
        Size(width=80, value_width=24, banks=2),
    ],
    ids=str,
)
def test_forward_and_gradients(size: Size):
    check(inputs(size), implementation="pallas", config=TILES)


@pytest.mark.parametrize(
    "size",
    # Wide tiles are not square: 32 queries by 16 pairs in the backward kernels.
    [Size(), Size(batch=1, length=37, banks=2, width=128, value_width=96)],
    ids=str,
)
def test_default_tiles(size: Size):
    args = inputs(size)
    # Logits of one size at every width.
    args = args._replace(scale=args.scale * (16 / size.width) ** 0.5)
    check(args, implementation="pallas")


def test_several_shares_of_the_queries():
    from pallas_kernels.persistent_read.launch import splits

    assert splits(tables=6, pairs=53, rows=150, config=TILES) == 2


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_dropout_is_a_function_of_the_place(implementation: str):
    size, key, rate = Size(length=12, pairs=18, banks=2), jax.random.key(7), 0.4
    low, high = dropout_seed(key)
    rows = jnp.arange(size.banks * size.heads * size.batch * size.length)
    factors = kept(low, high, rows[:, None], jnp.arange(size.pairs), rate)
    factors = np.asarray(factors).reshape(size.banks, size.heads, size.batch, size.length, -1)
    factors = np.moveaxis(factors, 1, 3)  # r b t h p
    assert abs(np.mean(factors == 0) - rate) < 0.05
    options = {"implementation": implementation, "config": TILES, "dropout": Dropout(rate, key)}
    check(inputs(size), factors, **options)


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_an_error_is_no_more_than_a_scale_costs(implementation: Any):
    """As the test of attention by this name; keys and queries have length 1."""
    args = inputs(Size(length=40, pairs=53))
    q, keys = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (args.q, args.keys))
    options: Any = {"implementation": implementation, "config": TILES}

    @jax.jit
    def outputs(args: Inputs) -> tuple[jax.Array, Inputs]:
        def loss(args: Inputs) -> Any:
            y = persistent_read(*args[:3], scale=args.scale, **options)
            return jnp.sum(y.ravel() * jnp.cos(jnp.arange(y.size))), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(args)
        return y, grads

    for scale in np.exp([0.0, 4.0, 8.0, 12.0, 16.0, 18.0, 20.0, 22.0]).astype(np.float32):
        args = Inputs(q, keys, args.values, jnp.array([scale, -scale]))
        y, grads = outputs(args)
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in (y, *grads)), scale
        wanted, wanted_grads = direct(args)
        cost = min(4 * scale * 2.0**-24, 2.0) + 4e-7
        largest = np.max(np.abs(args.values))
        assert np.max(np.abs(y - wanted)) <= cost * largest, scale
        for name, unit_of in (("values", 1.0), ("q", scale), ("keys", scale), ("scale", 80.0)):
            error = np.asarray(getattr(grads, name)) - getattr(wanted_grads, name)
            # A gradient adds up such errors, which have all signs.
            assert np.max(np.abs(error)) <= cost * unit_of * 16 * largest, (scale, name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any):
    args = inputs(Size(), dtype)
    y, grads = run(args, implementation="pallas", config=TILES)
    expected, expected_grads = direct(args)
    assert y.dtype == grads.q.dtype == grads.keys.dtype == grads.values.dtype == dtype
    assert_close(y, expected, BFLOAT16)
    assert_close(grads, expected_grads, BFLOAT16)


def test_float32_queries_of_half_precision_values():
    args = inputs(Size())
    args = args._replace(values=args.values.astype(jnp.bfloat16))
    y, grads = run(args, implementation="pallas", config=TILES)
    assert (y.dtype, grads.q.dtype, grads.values.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert_close(y, direct(args)[0], BFLOAT16)
    assert_close(grads, direct(args)[1], BFLOAT16)


@pytest.mark.parametrize("banks", [1, 2])
def test_xla_in_blocks_of_queries(banks: int, monkeypatch: pytest.MonkeyPatch):
    size = Size(batch=3, length=100, banks=banks)
    monkeypatch.setattr(xla, "WEIGHTS_LIMIT", 0)  # blocks of 128, the last one partly filled
    args = inputs(size)
    flat = Operands(args.q.reshape(300, size.heads, size.width), *args[1:])
    assert xla._blocks(flat) == (3, 128)
    check(args, implementation="xla")
    blocked = run(args, implementation="xla", dropout=Dropout(0.3, jax.random.key(1)))
    monkeypatch.undo()
    assert xla._blocks(flat) == (1, 300)
    at_once = run(args, implementation="xla", dropout=Dropout(0.3, jax.random.key(1)))
    assert_close(blocked[0], at_once[0], FORWARD)
    assert_close(blocked[1], at_once[1], GRADIENT)


def kernel(q: jax.Array, args: Inputs) -> jax.Array:
    options = {"scale": args.scale, "implementation": "pallas", "config": TILES}
    return persistent_read(q, args.keys, args.values, **options)


def test_vmap():
    args = inputs(Size())
    many = jnp.stack([args.q, 2 * args.q])
    loss = jax.grad(lambda q: jnp.sum(jnp.sin(kernel(q, args))))
    found = jax.jit(jax.vmap(loss))(many)
    assert_close(found, jnp.stack([loss(q) for q in many]), GRADIENT)


def test_scan_of_checkpointed_reads():
    args = inputs(Size())

    def scanned(q: jax.Array, read: Any) -> jax.Array:
        return jnp.sum(jnp.sin(jax.lax.scan(lambda q, _: (read(q), None), q, length=2)[0]))

    plain = jax.grad(lambda q: jnp.sum(jnp.sin(kernel(kernel(q, args), args))))(args.q)
    read = jax.checkpoint(lambda q: kernel(q, args))
    assert_close(jax.jit(jax.grad(lambda q: scanned(q, read)))(args.q), plain, GRADIENT)


def test_shard_map_over_the_batch():
    from jax.sharding import PartitionSpec as P

    args = inputs(Size(batch=4))
    mesh = make_mesh((2,), ("data",), jax.devices()[:2])
    spread = jax.shard_map(
        lambda q: kernel(q, args),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    assert_close(jax.jit(spread)(args.q), kernel(args.q, args), FORWARD)


@pytest.mark.parametrize("order", ["backward", "forward"])
def test_second_derivative_says_what_to_do(order: str):
    args = inputs(Size())
    loss = lambda q: jnp.sum(jnp.sin(kernel(q, args)))  # noqa: E731
    if order == "backward":
        twice = jax.grad(lambda q: jnp.sum(jax.grad(loss)(q)))
    else:
        twice = jax.jacfwd(jax.grad(loss))
    with pytest.raises(KernelUnsupported, match=r"persistent_read .* Use implementation='xla'"):
        twice(args.q)


@pytest.mark.parametrize("limit", [0, xla.WEIGHTS_LIMIT])
def test_second_derivative_of_xla(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(xla, "WEIGHTS_LIMIT", limit)
    args = inputs(Size(batch=1, length=2, pairs=3, width=2, value_width=2))

    def slope(q: jax.Array, form: Implementation) -> jax.Array:
        options = {"scale": args.scale, "implementation": form}
        read = lambda q: persistent_read(q, args.keys, args.values, **options)  # noqa: E731
        return jnp.sum(jax.grad(lambda q: jnp.sum(jnp.sin(read(q))))(q) ** 2)

    found, expected = (jax.grad(slope)(args.q, form) for form in ("xla", "reference"))
    assert_close(found, expected, GRADIENT)
