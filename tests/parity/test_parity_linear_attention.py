"""Every form of linear and squared attention against all pairs of tokens in float64.

A program is compiled once per form and kind of call (`Kind`), at one size: all else is data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, ShapeError
from jaxmem.ops.dispatch import explain
from jaxmem.ops.linear_attention import LinearState, linear_attention
from jaxmem.ops.squared_attention import quadratic_is_shorter, squared_attention, squared_features
from pallas_kernels._compat import stand_in_gpu
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.linear_attention import (
    IDS,
    STATE_DOCUMENT,
    Operands,
    Outputs,
    exact,
    operands,
    waves,
)

OPS = {1: linear_attention, 2: squared_attention}
SCALE = 0.4
LENGTH = len(IDS)
STRESS = Budget(rtol=2e-4, atol=2e-5, rms=1e-5)
"""At products of 1000 float32 keeps 4 digits of the smallest sums."""


class Form(NamedTuple):
    """Code of its own."""

    power: int
    implementation: str
    state: bool | None
    """Whether a state is read; None: either way."""


FORMS = {
    "linear-reference": Form(1, "reference", None),
    "linear-xla": Form(1, "xla", None),
    "linear-pallas": Form(1, "pallas", None),
    "squared-reference": Form(2, "reference", None),
    "squared-chunks": Form(2, "xla", True),
    "squared-pairs": Form(2, "xla", False),
    "squared-pallas": Form(2, "pallas", False),
}


class Kind(NamedTuple):
    """What a call asks for."""

    packed: bool
    gates: bool
    total: bool
    state: bool
    """Where the form leaves the choice."""
    groups: int
    """Of 4 heads."""
    chunk_size: int


# All pairs of the first four occur with every form that allows them, save for the kernels, whose
# own tests have rows without gates. Chunks: ragged, even, a whole row, single tokens, two uneven.
KINDS = {
    "plain": Kind(packed=False, gates=True, total=True, state=True, groups=2, chunk_size=8),
    "packed": Kind(packed=True, gates=True, total=False, state=True, groups=2, chunk_size=3),
    "fresh": Kind(packed=True, gates=True, total=True, state=False, groups=2, chunk_size=64),
    "no gates": Kind(packed=True, gates=False, total=True, state=True, groups=4, chunk_size=1),
    "bare": Kind(packed=False, gates=False, total=False, state=False, groups=4, chunk_size=16),
}
PLAIN, PACKED = KINDS["plain"], KINDS["fresh"]
CASES = [
    (form, kind)
    for form in FORMS
    for kind in KINDS
    if kind in ("plain", "fresh")
    or "pallas" not in form
    or (form, kind) == ("linear-pallas", "packed")
]


class Packing(NamedTuple):
    """Documents of the tokens, and that of the state if it is named."""

    ids: np.ndarray
    state_document: int | None = None


def has_state(form: Form, kind: Kind) -> bool:
    return kind.state if form.state is None else form.state


@functools.cache
def compiled(form: Form, **options: Any) -> Callable[..., Any]:
    """Compile outputs, and the gradients of their sum by `waves`."""

    def both(given: Operands, ids: Any, initial: Any) -> tuple[Outputs, Operands]:
        def call(given: Operands) -> Outputs:
            q, k, v, gates, state = given
            asked = {"initial_state": state, "segment_ids": ids, "initial_segment": initial}
            asked |= {"implementation": form.implementation, **options}
            return Outputs(*OPS[form.power](q, k, v, scale=SCALE, log_decay=gates, **asked))

        outputs, pull = jax.vjp(call, given)
        return outputs, pull(waves(outputs))[0]

    return jax.jit(both)


def run(
    form: Form, given: Operands, kind: Kind = PLAIN, packing: Packing | None = None
) -> tuple[Outputs, Operands]:
    ids = initial = None
    if packing is not None:
        ids = np.broadcast_to(np.int32(packing.ids), given.v.shape[:2])
        if packing.state_document is not None:
            initial = np.full(len(ids), packing.state_document, np.int32)
    program = compiled(form, with_total=kind.total, chunk_size=kind.chunk_size)
    return jax.tree.map(np.asarray, program(given, ids, initial))


def wanted(
    form: Form, given: Operands, kind: Kind = PLAIN, packing: Packing | None = None
) -> tuple[Outputs, Operands]:
    # All pairs of squares leave no state.
    left = {"with_total": kind.total, "with_state": form.power == 1 or has_state(form, kind)}
    return exact(form.power, SCALE, given, *(packing or ()), **left)


def drawn(form: Form, kind: Kind = PLAIN) -> Operands:
    """Draw operands of the one size."""
    given = operands(form.power, LENGTH, groups=kind.groups)
    if not kind.gates:
        given = given._replace(log_decay=None)
    if not has_state(form, kind):
        return given._replace(state=None)
    return given if kind.total else given._replace(state=given.state._replace(total=None))


def with_gates(given: Operands, gates: np.ndarray) -> Operands:
    return given._replace(log_decay=np.float32(gates))


every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forms(name: str, kind: str):
    form, asked = FORMS[name], KINDS[kind]
    given = drawn(form, asked)
    packing = None
    if asked.packed:
        packing = Packing(IDS, STATE_DOCUMENT if has_state(form, asked) else None)
    got, expected = (of(form, given, asked, packing) for of in (run, wanted))
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_long_rows_of_squares_take_all_pairs_block_by_block(implementation: str):
    given = operands(2, 300, heads=2, width=20, batch=1)._replace(state=None)
    assert quadratic_is_shorter(300, 20)
    form = Form(2, implementation, state=False)
    kind = PLAIN._replace(total=implementation == "xla")
    got, expected = run(form, given, kind), wanted(form, given, kind)
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


@every_form
def test_fast_decays_and_large_products(form: Form):
    given = drawn(form)
    large = np.float32(np.sqrt(1000.0 / SCALE))
    # Weights within a few tokens run over 40 orders of magnitude, beyond which they are 0.
    gates = np.where(np.arange(LENGTH)[:, None] % 5 == 0, -50.0, given.log_decay)
    given = with_gates(given._replace(q=large * given.q, k=large * given.k), gates)
    got, expected = run(form, given), wanted(form, given)
    assert_close(got[0], expected[0], STRESS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got[1]))


@every_form
@pytest.mark.parametrize("gate", [-300.0, -1e4, -1e30, -np.inf])
def test_gates_that_let_nothing_through(form: Form, gate: float):
    """They cost the weak gates beside them no digits, forward or backward; the state is dropped."""
    given = drawn(form)
    for places in ([(0, 5), (1, 10), (1, 11), (1, 0)], [(0, 0), (1, 8)]):  # (1, 8) starts a chunk
        gates = 0.01 * given.log_decay
        gates[tuple(np.transpose(places))] = gate
        got = run(form, with_gates(given, gates))
        expected = wanted(form, with_gates(given, np.maximum(gates, -1e4)))
        assert_close(got[0], expected[0], FORWARD)
        assert_close(got[1], expected[1], GRADIENT)


def of_tokens(rows: Any, tokens: np.ndarray) -> Any:
    """Return those tokens of a tree of rows."""
    return jax.tree.map(lambda a: a[:, tokens], rows)


THREE = Packing(np.repeat([3, 5, 6], [8, 5, 5]))


@every_form
def test_a_document_does_not_feel_the_growth_of_others(form: Form):
    """Gates of e^120 at and after the start of a document, all in one chunk."""
    given = drawn(form, PACKED)
    gates = np.array(given.log_decay)
    gates[:, 8:11] = 20.0 if form.power == 2 else 40.0
    gates[0, 8] = gates[0, 13] = 120.0
    given = with_gates(given, gates)
    got, expected = (of(form, given, PACKED, THREE) for of in (run, wanted))
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)
    for at in (document == THREE.ids for document in (3, 5, 6)):
        assert_close(*(of_tokens(o[:2], at) for o, _ in (got, expected)), FORWARD)
        assert_close(*(of_tokens(g[:3], at) for _, g in (got, expected)), GRADIENT)


@every_form
def test_growth_beyond_all_floats_stays_in_its_document(form: Form):
    """Three documents in one chunk; the middle one grows, and the last one's gates are weak."""
    given = drawn(form, PACKED)
    gates = 0.01 * given.log_decay
    expected, _ = wanted(form, with_gates(given, gates), PACKED, THREE)
    gates[0, 9], gates[1, 10] = 1e30, np.inf
    got, _ = run(form, with_gates(given, gates), PACKED, THREE)
    assert_close(*(of_tokens(o[:2], THREE.ids != 5) for o in (got, expected)), FORWARD)


@every_form
def test_padding_may_hold_anything_but_queries(form: Form):
    given, padding = drawn(form, PACKED), (IDS == 0)[:, None]
    clean, _ = run(form, given, PACKED, Packing(IDS))
    k, v = (np.where(padding[..., None], np.nan, a) for a in (given.k, given.v))
    dirty = given._replace(k=k, v=v, log_decay=np.where(padding, np.nan, given.log_decay))
    found, _ = run(form, jax.tree.map(np.float32, dirty), PACKED, Packing(IDS))
    np.testing.assert_array_equal(found.y, clean.y)


@pytest.mark.parametrize("power", [1, 2])
def test_a_decay_per_head_is_one_of_every_token(power: int):
    q, k, v, *_ = operands(power, 9)
    rates = np.linspace(-2.0, 0.0, 4, dtype=np.float32)
    call = jax.jit(lambda *rows: OPS[power](*rows[:3], log_decay=rows[3]).y)
    every = np.broadcast_to(rates, v.shape[:3])
    np.testing.assert_array_equal(call(q, k, v, rates), call(q, k, v, every))


@pytest.mark.parametrize("power", [1, 2])
def test_half_precision_sums_in_float32(power: int):
    given = operands(power, 33, width=16, value_width=16)._replace(state=None)
    half = [a.astype(jnp.bfloat16) for a in given[:3]]

    def call(q: Any, k: Any, v: Any, gates: Any = None) -> Any:
        return OPS[power](q, k, v, scale=SCALE, log_decay=gates, with_total=True)

    narrow = jax.jit(call)(*half, given.log_decay)
    given = given._replace(**dict(zip("qkv", map(np.float32, half), strict=True)))
    expected, _ = exact(power, SCALE, given)
    assert (narrow.y.dtype, narrow.total.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(narrow.y, expected.y, BFLOAT16)
    halves = jax.eval_shape(call, *(a.astype(np.float16) for a in half))
    assert halves.y.dtype == jnp.float32


def test_features_multiply_to_squares():
    x, y = np.float32(np.random.default_rng(0).normal(size=(2, 6, 5)))
    of_both = np.asarray(jax.jit(squared_features)(np.stack([x, y])))
    assert of_both.shape == (2, 6, 15)
    assert_close(np.sum(np.prod(of_both, axis=0), axis=-1), np.sum(x * y, axis=-1) ** 2, FORWARD)
    # Row by row over i <= j, and √2 off the diagonal.
    np.testing.assert_allclose(
        jax.jit(squared_features)(np.array([2.0, 3.0, 5.0], np.float32)),
        [4, 6 * 2**0.5, 10 * 2**0.5, 9, 15 * 2**0.5, 25],
        rtol=1e-6,
    )


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("op", OPS.values(), ids=["linear", "squared"])
def test_bad_calls_say_what_to_do(op: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without the tests' hook
    q = k = zeros(2, 3, 2, 4)
    v = zeros(2, 3, 4, 5)

    def trace(q: Any, k: Any, v: Any, **options: Any) -> None:
        jax.eval_shape(lambda *rows: op(*rows, **options), q, k, v)

    trace(q, k, v)
    with pytest.raises(ShapeError, match="H a multiple of G"):
        trace(q, k, v[:, :, :3])
    with pytest.raises(ShapeError, match="is empty"):
        trace(q[..., :0], k[..., :0], v)
    with pytest.raises(DTypeError, match="segment_ids is float32"):
        trace(q, k, v, segment_ids=zeros(2, 3))
    with pytest.raises(ShapeError, match="one number per token and head"):
        trace(q, k, v, log_decay=zeros(2, 3, 2))
    with pytest.raises(ShapeError, match="sums per head"):
        trace(q, k, v, initial_state=LinearState(zeros(2, 4, 7, 5), None))
    with pytest.raises(DTypeError, match="int32"):
        trace(q.astype(np.int32), k, v)
    with pytest.raises(ConfigError, match="not positive"):
        trace(q, k, v, chunk_size=0)
    with pytest.raises(ConfigError, match="not a finite"):
        trace(q, k, v, scale=float("nan"))


def test_a_state_must_know_totals_where_they_are_asked_for():
    q, v = zeros(2, 3, 2, 4), zeros(2, 3, 2, 5)
    state = LinearState(zeros(2, 2, 4, 5), None)
    call = functools.partial(linear_attention, with_total=True)
    with pytest.raises(ShapeError, match=r"initial_state\.total is None"):
        jax.eval_shape(lambda q, v, state: call(q, q, v, initial_state=state), q, v, state)


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
    state = LinearState(zeros(1, 2, 16, 16), None)
    row = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32)

    def chunks() -> str:
        def call(q: Any, state: Any) -> Any:
            return linear_attention(q, q, q, initial_state=state, implementation="xla")

        return str(jax.make_jaxpr(call)(row, state))

    with stand_in_gpu("NVIDIA H200"):
        assert "length=4" in chunks()
    assert "length=16" in chunks()
