"""Every form of the weighted average against autodiff of its definition in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops import gated_scan as scan_op
from jaxmem.ops import weighted_average as average_op
from jaxmem.ops.weighted_average import (
    EMPTY,
    WeightedOutput,
    WeightedState,
    init_weighted_state,
    weighted_average,
)
from pallas_kernels.gated_scan import GatedScanConfig
from tests.helpers.compare import Budget, assert_close
from tests.helpers.off_cpu import elsewhere_only

FORMS = {"steps": "xla", "tree": "xla", "reference": "reference", "pallas": "pallas"}
"""Implementation of each form; the tree is what `xla` runs off the CPU."""
BATCH, HEADS, WIDTH = 2, 2, 3
# Log-weights of 1e2 have an absolute rounding of 1e-5, which is a relative one of their
# exponential. Twice what was measured.
FORWARD = Budget(rtol=1e-5, atol=1e-5, rms=5e-6)
GRADIENT = Budget(rtol=1e-4, atol=5e-5, rms=2e-5)
IDS = np.array(
    [[0, 3, 3, 0, 3, 3, 3, 1, 0, 1, 1, 0, 0], [2, 2, 2, 2, 5, 5, 5, 5, 5, 0, 0, 2, 2]], np.int32
)
Operands = dict[str, jax.Array]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation of each form."""
    if request.param == "tree":
        elsewhere_only(monkeypatch, average_op, scan_op)
    return FORMS[request.param]


def operands(
    length: int, *, weights: int = WIDTH, spread: float = 1.0, varying: bool, bonus: bool = True
) -> Operands:
    """Return v, k, w and perhaps u, as float32."""
    draw = np.random.default_rng(length + weights)
    full = (BATCH, length, HEADS, weights)
    found = {
        "v": draw.normal(size=(BATCH, length, HEADS, WIDTH)),
        "k": spread * draw.normal(size=full),
        "w": -draw.exponential(size=full if varying else (HEADS, weights)),
    }
    if bonus:
        found["u"] = draw.normal(size=(HEADS, weights))
    return {name: jnp.asarray(a, jnp.float32) for name, a in found.items()}


def start(weights: int) -> WeightedState:
    draw = np.random.default_rng(1)
    shapes = ((BATCH, HEADS, WIDTH), (BATCH, HEADS, weights))
    return WeightedState(*(jnp.asarray(draw.normal(size=s), jnp.float32) for s in shapes))


def direct(o: Operands, state: WeightedState | None) -> WeightedOutput:
    """Give every pair of tokens its weight, from all tokens for every token anew: O(T^2)."""
    v, k = o["v"], jnp.broadcast_to(o["k"], o["v"].shape)
    w = jnp.broadcast_to(o["w"], k.shape)
    length = v.shape[1]
    if state is not None:  # one more token in front, with the weight and the value of the state
        v = jnp.concatenate([state.mean[:, None], v], axis=1)
        first = jnp.broadcast_to(state.log_total, state.mean.shape)[:, None]
        k, w = (jnp.concatenate([a, b], axis=1) for a, b in ((first, k), (0 * first, w)))
    clock = jnp.cumsum(w, axis=1)
    age = clock[:, :, None] - clock[:, None]  # [B T S H V]: decays after s up to t
    steps = jnp.arange(v.shape[1])
    past = (steps[:, None] >= steps)[None, :, :, None, None]
    logs = jnp.where(past, age + k[:, None], -jnp.inf)
    totals = jax.nn.logsumexp(logs, axis=2)
    means = jnp.einsum("btshv,bshv->bthv", jnp.exp(logs - totals[:, :, None]), v)
    after = WeightedState(means[:, -1], totals[:, -1, :, : o["k"].shape[-1]])
    if "u" in o:
        diagonal = (steps[:, None] == steps)[None, :, :, None, None]
        # In its own output a token has its bonus, and the decay of this step is still to come.
        logs = jnp.where(diagonal, (o["u"] + k)[:, None], logs - w[:, :, None])
        logs = jnp.where(past, logs, -jnp.inf)
        means = jnp.einsum("btshv,bshv->bthv", jax.nn.softmax(logs, axis=2), v)
    return WeightedOutput(means[:, -length:], after)


def functional(tree: Any) -> jax.Array:
    """Weigh all entries differently, so that no error cancels in the sum."""
    leaves = jax.tree.leaves(tree)
    return sum(
        jnp.sum(a * jnp.cos(jnp.arange(a.size).astype(a.dtype)).reshape(a.shape)) for a in leaves
    )


def op(form: str, **options: Any) -> Callable[..., Any]:
    def run(o: dict[str, jax.Array], state: WeightedState | None) -> Any:
        return weighted_average(
            o["v"],
            o["k"],
            o["w"],
            bonus=o.get("u"),
            initial_state=state,
            implementation=form,
            **options,
        )

    return run


def value_and_grads(run: Callable[..., Any]) -> Callable[..., Any]:
    def scalar(o: Any, state: Any) -> tuple[jax.Array, Any]:
        out = run(o, state)
        return functional(out), out

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))


def exact(o: Operands, state: WeightedState | None) -> Any:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (o, state))
        (_, out), grads = value_and_grads(direct)(*wide)
        return jax.tree.map(np.asarray, (out, grads))


CASES = {
    "one token": (1, WIDTH, 1.0, False, True, False),
    "the operator": (37, WIDTH, 1.0, False, True, True),
    "large log-weights": (37, WIDTH, 60.0, False, True, False),
    "time-varying, large, with bonus": (23, WIDTH, 60.0, True, True, True),
    "gated keys": (23, 1, 1.0, True, False, True),
    "gated keys, large": (23, 1, 60.0, True, False, False),
}


@functools.cache
def case(name: str) -> tuple[Operands, WeightedState | None, Any]:
    """Return the arguments of a case and its exact results."""
    length, weights, spread, varying, bonus, continued = CASES[name]
    o = operands(length, weights=weights, spread=spread, varying=varying, bonus=bonus)
    state = start(weights) if continued else None
    return o, state, exact(o, state)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(form: str, name: str):
    o, state, expected = case(name)
    (_, out), grads = value_and_grads(op(form))(o, state)
    assert_close(out, expected[0], FORWARD)
    assert_close(grads, expected[1], GRADIENT)


DOCUMENTS = [
    (0, [1, 2, 4, 5, 6]),
    (0, [7, 9, 10]),
    (1, range(4)),
    (1, range(4, 9)),
    (1, [11, 12]),
]


@functools.cache
def documents_alone() -> Any:
    """Return outputs and gradients of the documents of `IDS`, each in a call of its own."""

    def alone(o: dict[str, jax.Array], state: None) -> jax.Array:
        y = jnp.zeros_like(o["v"])
        for row, tokens in DOCUMENTS:
            at = np.array(tokens)
            part = {n: a if n == "u" else a[row, at][None] for n, a in o.items()}
            y = y.at[row, at].set(op("reference")(part, state)[0][0])
        return y

    (_, y), grads = value_and_grads(alone)(operands(IDS.shape[1], weights=1, varying=True), None)
    return y, grads


def test_packed_rows_equal_documents_alone(form: str):
    o = operands(IDS.shape[1], weights=1, varying=True)
    run = op(form, segment_ids=jnp.asarray(IDS))
    (_, y), grads = value_and_grads(lambda o, s: run(o, s)[0])(o, None)
    expected, expected_grads = documents_alone()
    assert_close(y, expected, FORWARD)
    assert_close(grads, expected_grads, GRADIENT)


def test_nothing_in_padding_reaches_real_tokens(form: str):
    o = operands(IDS.shape[1], weights=1, varying=True)
    o["u"] = jnp.broadcast_to(o["u"], o["k"].shape)
    empty = (IDS == 0)[..., None, None]
    nan = {name: jnp.where(empty, jnp.nan, a) for name, a in o.items()}
    run = value_and_grads(op(form, segment_ids=jnp.asarray(IDS)))
    (_, expected), expected_grads = run(o, start(1))
    (_, out), grads = run(nan, start(1))
    assert_close(out, expected, FORWARD)
    assert_close(grads, expected_grads, GRADIENT)


def test_two_halves_are_one_call(form: str):
    o = operands(IDS.shape[1], weights=1, varying=True)
    ids = jnp.asarray(IDS)

    def halves(o: dict[str, jax.Array], state: WeightedState, cut: int) -> Any:
        first = {n: a if n == "u" else a[:, :cut] for n, a in o.items()}
        second = {n: a if n == "u" else a[:, cut:] for n, a in o.items()}
        y_1, state = op(form, segment_ids=ids[:, :cut], initial_segment=jnp.array([3, 9]))(
            first, state
        )
        before = jnp.array([3, 5])  # documents at the cut
        y_2, state = op(form, segment_ids=ids[:, cut:], initial_segment=before)(second, state)
        return WeightedOutput(jnp.concatenate([y_1, y_2], axis=1), state)

    whole = op(form, segment_ids=ids, initial_segment=jnp.array([3, 9]))
    expected = value_and_grads(whole)(o, start(1))
    # Row 0 begins with padding in the state's document, row 1 with another document.
    found = value_and_grads(lambda o, s: halves(o, s, 5))(o, start(1))
    assert_close(found[0][1], expected[0][1], FORWARD)
    assert_close(found[1], expected[1], GRADIENT)
    assert float(jnp.max(jnp.abs(expected[1][1].mean[0]))) > 0
    np.testing.assert_array_equal(expected[1][1].mean[1], 0.0)


def test_extremes_are_finite(form: str):
    o = operands(7, weights=1, varying=True)
    still = dict(o, w=0 * o["w"], k=0 * o["k"])
    forgetful = dict(o, w=jnp.full_like(o["w"], -1e30))
    huge = dict(o, k=1e20 * o["k"])
    run = value_and_grads(op(form))
    for extreme in (still, forgetful, huge):
        (_, out), grads = run(extreme, None)
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves((out, grads)))
    y, _ = op(form)({n: forgetful[n] for n in "vkw"}, None)
    assert_close(y, o["v"], FORWARD)
    padded, state = op(form, segment_ids=jnp.zeros((BATCH, 7), jnp.int32))(o, None)
    np.testing.assert_array_equal(padded, 0.0)
    np.testing.assert_array_equal(state.log_total, np.float32(EMPTY))


# Log-weights of the first three tokens and of the others, and log-decay; then ones that a direct
# sum in float64 can tell apart, with the same shares.
EXTREMES = [
    ((-1e30, -1e30, -0.3), (0.0, 0.0, -0.3)),
    ((1e30, 1e30, -0.3), (0.0, 0.0, -0.3)),
    ((-np.inf, -np.inf, -0.3), (0.0, 0.0, -0.3)),
    ((np.inf, np.inf, -0.3), (0.0, 0.0, -0.3)),
    ((-1e30, 0.5, -0.3), (-200.0, 0.5, -0.3)),
    ((-np.inf, 0.5, -0.3), (-200.0, 0.5, -0.3)),
    ((1e30, 0.5, -0.3), (200.0, 0.5, -0.3)),
    ((0.5, -1e30, -0.3), (0.5, -200.0, -0.3)),
    ((0.5, 0.5, -1e30), (0.5, 0.5, -200.0)),
    ((0.5, 0.5, -np.inf), (0.5, 0.5, -200.0)),
    ((0.5, 0.5, 1e30), (0.5, 0.5, 200.0)),
    ((-1e30, -1e30, -np.inf), (0.0, 0.0, -200.0)),
]


def test_log_weights_and_decays_of_any_size(form: str):
    o = operands(7, weights=1, varying=True)

    def of(cases: np.ndarray) -> dict[str, np.ndarray]:
        first, rest, w = cases.T[..., None, None, None, None]
        k = np.where(np.arange(7)[:, None, None] < 3, first, rest)
        k = np.broadcast_to(k, (len(cases), *o["k"].shape)).astype(np.float32)
        return {"k": k, "w": np.broadcast_to(w, k.shape).astype(np.float32)}

    def every(run: Callable[..., Any], logs: Any, o: Operands) -> Any:
        def alone(o: Operands, logs: Any) -> Any:
            (_, y), grads = value_and_grads(lambda o, s: run(o, s)[0])(o | logs, None)
            return y, grads[0]

        return jax.jit(jax.vmap(alone, (None, 0)))(o, logs)

    extreme, plain = (of(np.array(side)) for side in zip(*EXTREMES, strict=True))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (plain, o))
        y, grads = jax.tree.map(np.asarray, every(direct, *wide))
    # Beyond the largest size there is no slope.
    grads = {n: np.where(np.isfinite(extreme.get(n, 0.0)), a, 0.0) for n, a in grads.items()}
    found = every(op(form), extreme, o)
    assert_close(found[0], y, FORWARD)
    assert_close(found[1], grads, GRADIENT)


def test_half_precision_is_computed_in_float32():
    o = {n: jnp.asarray(a, jnp.bfloat16) for n, a in operands(9, varying=True).items()}
    y, state = op("auto")(o, None)
    wide, _ = op("auto")({n: a.astype(jnp.float32) for n, a in o.items()}, None)
    assert y.dtype == jnp.bfloat16
    assert state.mean.dtype == state.log_total.dtype == jnp.float32
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def test_transformations():
    o = operands(6, weights=1, varying=True)

    def loss(o: dict[str, jax.Array]) -> jax.Array:
        return functional(op("xla")(o, None)[0])

    plain = jax.jit(jax.grad(loss))(o)
    by_row = {n: None if n == "u" else 0 for n in o}
    rows = {n: a if n == "u" else a[:, None] for n, a in o.items()}
    mapped = jax.vmap(lambda o: op("xla")(o, None)[0][0], (by_row,))(rows)
    assert_close(mapped, op("xla")(o, None)[0], FORWARD)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(o), plain, GRADIENT)
    twice, _ = jax.jit(lambda o: jax.lax.scan(lambda s, _: (s + loss(o), None), 0.0, None, 2))(o)
    assert_close(twice, 2 * loss(o), FORWARD)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = {n: P() if n == "u" else P("data") for n in o}
    shared = jax.shard_map(
        lambda o: op("xla")(o, None)[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P("data"),
        check_vma=False,
    )
    assert_close(jax.jit(shared)(o), op("xla")(o, None)[0], FORWARD)


def test_config_and_interpret_are_those_of_the_scan(monkeypatch: pytest.MonkeyPatch):
    o = operands(9, varying=True)
    given = []

    def scan(*args: Any, **options: Any) -> Any:
        given.append((options["config"], options["interpret"]))
        return scan_op.gated_scan(*args, **options)

    monkeypatch.setattr(average_op, "gated_scan", scan)
    tiles = GatedScanConfig(rows=4, block=16)
    y, _ = op("pallas", config=tiles, interpret=True)(o, None)
    assert_close(y, op("reference")(o, None)[0], FORWARD)
    assert given == [(tiles, True)]
    with pytest.raises(KernelUnsupported, match="block=48, which is no power of two"):
        op("pallas", config=GatedScanConfig(block=48))(o, None)


@pytest.mark.parametrize("cut", [np.s_[:0], np.s_[:, :0]], ids=["no row", "no token"])
def test_nothing_changes_nothing(cut: Any):
    o = {n: a if n == "u" else a[cut] for n, a in operands(5, varying=True).items()}
    state = jax.tree.map(lambda a: a[: len(o["v"])], start(WIDTH))
    ids = jnp.ones(o["v"].shape[:2], jnp.int32)
    for name in set(FORMS.values()):
        y, after = op(name, segment_ids=ids)(o, state)
        assert y.shape == o["v"].shape
        assert_close(after, state, FORWARD)


def test_bad_input():
    o = operands(5, varying=True)
    with pytest.raises(ShapeError, match=r"an axis of values .* is empty"):
        op("auto")(dict(o, v=o["v"][..., :0]), None)
    with pytest.raises(ShapeError, match=r"broadcast to \[B T H 1\] or \[B T H V\]"):
        op("auto")(dict(o, w=o["w"][..., :2]), None)
    with pytest.raises(ShapeError, match=r"log_total has shape \(2, 2, 1\).*shape \(2, 2, 3\)"):
        op("auto")(o, init_weighted_state(BATCH, HEADS, WIDTH))
    with pytest.raises(KernelUnsupported, match="has no implementation 'cudnn'"):
        op("cudnn")(o, None)
