"""Every form of linear and squared attention against all pairs of tokens in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, ShapeError
from jaxmem.ops.dispatch import explain
from jaxmem.ops.linear_attention import init_linear_state, linear_attention
from jaxmem.ops.squared_attention import quadratic_is_shorter, squared_attention, squared_features
from pallas_kernels._compat import stand_in_gpu
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.linear_attention import (
    IDS,
    STATE_DOCUMENT,
    Operands,
    formula,
    functional,
    operands,
)

OPS = {1: linear_attention, 2: squared_attention}
SCALE = 0.4
STRESS = Budget(rtol=2e-4, atol=2e-5, rms=1e-5)
"""At products of 1000 float32 keeps 4 digits of the smallest sums."""


def drawn(power: int, length: int, **size: Any) -> Operands:
    """Draw operands, with a state whose total is one of squares if weights are squares."""
    given = operands(power, length, **size)
    if power == 1 or given.state.total is None:
        return given
    keys = np.random.default_rng(length).normal(
        size=(*given.v.shape[::2][:2], 7, size.get("width", 5))
    )
    total = np.sum(np.asarray(squared_features(jnp.asarray(keys))), axis=2)
    return given._replace(state=given.state._replace(total=total))


def run(power: int, given: Operands, *, with_total: bool = True, **options: Any) -> tuple[Any, Any]:
    """Return outputs and the gradients of a functional of them, in float32."""
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)

    def scalar(given: Operands) -> tuple[jax.Array, Any]:
        q, k, v, gates, state = given
        asked = {"initial_state": state, "with_total": with_total, **options}
        read = OPS[power](q, k, v, scale=SCALE, log_decay=gates, **asked)
        outputs = tuple(leaf for leaf in read if leaf is not None)
        return functional(outputs), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(given)
    return outputs, grads


def wanted(
    power: int, given: Operands, *, stateful: bool, with_total: bool = True, **options: Any
) -> tuple[Any, Any]:
    """Return the same of the formula, in float64."""
    with jax.enable_x64(True):
        given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), given)
        whole = given
        if not stateful:
            features = given.q.shape[-1] if power == 1 else squared_features(given.q).shape[-1]
            shape = (given.v.shape[0], given.v.shape[2], features, given.v.shape[3])
            zeros = init_linear_state(*shape, with_total=True, dtype=jnp.float64)

        def scalar(given: Operands) -> tuple[jax.Array, Any]:
            whole = given if stateful else given._replace(state=zeros)
            y, total, state = formula(power, SCALE, whole, **options)
            if not with_total:
                total, state = None, state._replace(total=None)
            # All pairs of squares leave no state.
            read = (y, total, state if stateful or power == 1 else None)
            outputs = tuple(leaf for leaf in read if leaf is not None)
            return functional(outputs), outputs

        (_, outputs), grads = jax.value_and_grad(scalar, has_aux=True)(whole)
        return outputs, grads


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_total", [False, True])
def test_forms_without_a_state(power: int, implementation: str, packed: bool, with_total: bool):
    given = operands(power, len(IDS))._replace(state=None)
    ids = jnp.broadcast_to(IDS, (2, len(IDS))) if packed else None
    options = {"implementation": implementation, "chunk_size": 4, "segment_ids": ids}
    got = run(power, given, with_total=with_total, **options)
    shape = {"ids": IDS if packed else None, "with_total": with_total}
    expected = wanted(power, given, stateful=False, **shape)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize(
    ("power", "implementation"),
    [(1, "reference"), (1, "xla"), (1, "pallas"), (2, "reference"), (2, "xla")],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_total", [False, True])
def test_forms_with_a_state(power: int, implementation: str, packed: bool, with_total: bool):
    given = drawn(power, len(IDS), with_total=with_total)
    options: dict[str, Any] = {"with_total": with_total}
    if packed:
        options["segment_ids"] = jnp.broadcast_to(IDS, (2, len(IDS)))
        options["initial_segment"] = jnp.full((2,), STATE_DOCUMENT)
    got = run(power, given, implementation=implementation, chunk_size=4, **options)
    shape = {"ids": IDS, "state_document": STATE_DOCUMENT} if packed else {}
    expected = wanted(power, given, stateful=True, with_total=with_total, **shape)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
def test_chunks_of_any_size(power: int, chunk_size: int):
    given = drawn(power, 17, decay=False, groups=4)
    got = run(power, given, implementation="xla", chunk_size=chunk_size)
    expected = wanted(power, given, stateful=True)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_long_rows_of_squares_take_all_pairs_block_by_block(implementation: str):
    given = operands(2, 300, heads=2, width=20, batch=1)._replace(state=None)
    assert quadratic_is_shorter(300, 20)
    got = run(2, given, implementation=implementation)
    expected = wanted(2, given, stateful=False)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_fast_decays_and_large_products(power: int, implementation: str):
    given = operands(power, 40, groups=4)._replace(state=None)
    large = np.sqrt(1000.0 / SCALE)
    # Weights within a few tokens run over 40 orders of magnitude, beyond which they are 0.
    gates = np.where(np.arange(40)[:, None] % 5 == 0, -50.0, given.log_decay)
    given = given._replace(q=large * given.q, k=large * given.k, log_decay=gates)
    got = run(power, given, implementation=implementation, chunk_size=8)
    expected = wanted(power, given, stateful=False)
    assert_close(got[0], expected[0], STRESS)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(got[1]))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("gate", [-300.0, -1e4, -np.inf])
def test_gates_that_let_nothing_through(power: int, implementation: str, gate: float):
    """They cost the weak gates beside them no digits, forward or backward."""
    given = operands(power, 19)._replace(state=None)
    gates = 0.01 * given.log_decay
    gates[0, 5], gates[1, 10:12], gates[1, 0] = gate, gate, gate
    got = run(power, given._replace(log_decay=gates), implementation=implementation, chunk_size=8)
    finite = given._replace(log_decay=np.maximum(gates, -1e4))
    expected = wanted(power, finite, stateful=False)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("gate", [-300.0, -1e4, -np.inf])
def test_gates_that_drop_the_state(power: int, implementation: str, gate: float):
    given = drawn(power, 9)
    gates = 0.01 * given.log_decay
    gates[0, 0] = gates[1, 4] = gate
    got = run(power, given._replace(log_decay=gates), implementation=implementation, chunk_size=4)
    finite = given._replace(log_decay=np.maximum(gates, -1e4))
    expected = wanted(power, finite, stateful=True)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_a_document_does_not_feel_the_growth_of_others(power: int, implementation: str):
    """Gates of e^120 at and after the start of a document, all in one chunk."""
    ids = np.repeat([3, 5, 6], [4, 5, 3])
    given = operands(power, 12)._replace(state=None)
    gates = np.array(given.log_decay)
    gates[:, 4:7] = 20.0 if power == 2 else 40.0
    gates[0, 4] = gates[0, 9] = 120.0
    rows = {"segment_ids": jnp.broadcast_to(ids, (2, 12)), "implementation": implementation}
    got = run(power, given._replace(log_decay=gates), **rows)
    expected = wanted(power, given._replace(log_decay=gates), stateful=False, ids=ids)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("power", [1, 2])
def test_a_decay_per_head_is_one_of_every_token(power: int):
    given = operands(power, 9)._replace(state=None)
    rates = jnp.linspace(-2.0, 0.0, 4)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in given[:3])
    fixed = OPS[power](q, k, v, log_decay=rates)
    every = OPS[power](q, k, v, log_decay=jnp.broadcast_to(rates, v.shape[:3]))
    np.testing.assert_array_equal(fixed.y, every.y)


@pytest.mark.parametrize("power", [1, 2])
def test_half_precision_sums_in_float32(power: int):
    given = operands(power, 33, width=16, value_width=16)._replace(state=None)
    q, k, v, gates, _ = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), given)
    wide = tuple(a.astype(jnp.float32) for a in (q, k, v))
    options = {"log_decay": gates.astype(jnp.float32), "with_total": True}
    narrow, expected = OPS[power](q, k, v, **options), OPS[power](*wide, **options)
    assert (narrow.y.dtype, narrow.total.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(narrow.y, expected.y, BFLOAT16)
    halves = OPS[power](*(a.astype(jnp.float16) for a in (q, k, v)), **options)
    assert halves.y.dtype == jnp.float32


def test_features_multiply_to_squares():
    draw = np.random.default_rng(0)
    x, y = jnp.asarray(draw.normal(size=(2, 6, 5)), jnp.float32)
    assert squared_features(x).shape == (6, 15)
    products = jnp.sum(squared_features(x) * squared_features(y), axis=-1)
    assert_close(products, jnp.sum(x * y, axis=-1) ** 2, FORWARD)
    # Row by row over i <= j, and √2 off the diagonal.
    np.testing.assert_allclose(
        squared_features(jnp.asarray([2.0, 3.0, 5.0])),
        [4, 6 * 2**0.5, 10 * 2**0.5, 9, 15 * 2**0.5, 25],
        rtol=1e-6,
    )


def test_padding_may_hold_anything_but_queries():
    given = operands(1, len(IDS))._replace(state=None)
    ids = jnp.broadcast_to(IDS, (2, len(IDS)))
    q, k, v, gates, _ = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)
    dirty = (IDS == 0)[:, None]
    options = {"segment_ids": ids, "log_decay": jnp.where(dirty, jnp.nan, gates)}
    for op in OPS.values():
        clean = op(q, k, v, segment_ids=ids, log_decay=gates).y
        np.testing.assert_array_equal(op(q, *nothing_of(k, v, dirty), **options).y, clean)


def nothing_of(k: jax.Array, v: jax.Array, dirty: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return keys and values that are NaN in padding."""
    return tuple(jnp.where(dirty[..., None], jnp.nan, a) for a in (k, v))


@pytest.mark.parametrize("op", OPS.values(), ids=["linear", "squared"])
def test_bad_calls_say_what_to_do(op: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without the tests' hook
    q = k = jnp.ones((2, 3, 2, 4))
    v = jnp.ones((2, 3, 4, 5))
    with pytest.raises(ShapeError, match="H a multiple of G"):
        op(q, k, v[:, :, :3])
    with pytest.raises(ShapeError, match="is empty"):
        op(q[..., :0], k[..., :0], v)
    with pytest.raises(DTypeError, match="segment_ids is float32"):
        op(q, k, v, segment_ids=jnp.ones((2, 3)))
    with pytest.raises(ShapeError, match="one number per token and head"):
        op(q, k, v, log_decay=jnp.ones((2, 3, 2)))
    with pytest.raises(ShapeError, match="sums per head"):
        op(q, k, v, initial_state=init_linear_state(2, 4, 7, 5, with_total=False))
    with pytest.raises(DTypeError, match="int32"):
        op(q.astype(jnp.int32), k, v)
    with pytest.raises(ConfigError, match="not positive"):
        op(q, k, v, chunk_size=0)
    with pytest.raises(ConfigError, match="not a finite"):
        op(q, k, v, scale=float("nan"))


def test_a_state_must_know_totals_where_they_are_asked_for():
    q, v = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 2, 5))
    state = init_linear_state(2, 2, 4, 5, with_total=False)
    with pytest.raises(ShapeError, match=r"initial_state\.total is None"):
        linear_attention(q, q, v, initial_state=state, with_total=True)


def test_long_rows_of_squares_take_chunks_off_the_gpu_and_the_kernel_on_it():
    # Times are equal at about 5 (32 + 136) tokens on a CPU.
    assert quadratic_is_shorter(839, 16)
    assert not quadratic_is_shorter(840, 16)
    long = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    assert explain("squared_attention", long, long, long).implementation == "xla"
    with stand_in_gpu("NVIDIA H200"):
        choice = explain("squared_attention", long, long, long)
    assert (choice.implementation, choice.reason) == ("pallas", "the preferred implementation")


@pytest.mark.parametrize("power", [1, 2])
def test_decoding_on_a_gpu_takes_no_kernel_unless_one_is_named(power: int):
    few, more = (jax.ShapeDtypeStruct((8, t, 2, 64), jnp.float32) for t in (16, 17))
    op = OPS[power].__name__
    with stand_in_gpu("NVIDIA H200"):
        choice = explain(op, few, few, few)
        assert choice.implementation == "xla"
        assert choice.reason == (
            "not pallas: 16 tokens decode, and the kernel is made for rows of many"
        )
        assert explain(op, more, more, more).implementation == "pallas"
        assert explain(op, few, few, few, implementation="pallas").implementation == "pallas"


def test_chunks_are_larger_on_a_gpu():
    state = init_linear_state(1, 2, 16, 16, with_total=False)
    row = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32)

    def chunks(q: Any) -> str:
        options = {"initial_state": state, "implementation": "xla"}
        return str(jax.make_jaxpr(lambda q: linear_attention(q, q, q, **options))(q))

    with stand_in_gpu("NVIDIA H200"):
        assert "length=4" in chunks(row)
    assert "length=16" in chunks(row)
