"""Every form of the weighted average against autodiff of its definition in float64.

A form is compiled once for each set of shapes: all else, documents too, is data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported, ShapeError
from jaxmem.ops import gated_scan as scan_op
from jaxmem.ops import weighted_average as average_op
from jaxmem.ops.weighted_average import (
    EMPTY,
    WeightedOutput,
    WeightedState,
    weighted_average,
)
from pallas_kernels.gated_scan import GatedScanConfig
from tests.helpers.compare import Budget, assert_close
from tests.helpers.off_cpu import elsewhere_only

TILES = GatedScanConfig(rows=4, block=16)
FORMS: dict[str, dict[str, Any]] = {
    "steps": {"implementation": "xla"},
    "tree": {"implementation": "xla"},
    "reference": {"implementation": "reference"},
    "pallas": {"implementation": "pallas", "config": TILES},
}
"""The tree is what `xla` runs off the CPU; `pallas` is a kernel for the gated scan inside."""
BATCH, LENGTH, HEADS, WIDTH = 2, 23, 2, 3
# Log-weights of 1e2 have an absolute rounding of 1e-5, which is a relative one of their
# exponential. Twice what was measured.
FORWARD = Budget(rtol=1e-5, atol=1e-5, rms=5e-6)
GRADIENT = Budget(rtol=1e-4, atol=5e-5, rms=2e-5)
Operands = dict[str, np.ndarray]


class Documents(NamedTuple):
    """Which document each token is of, and which the state is of."""

    ids: np.ndarray
    initial: np.ndarray


ROWS = [
    [0, 3, 3, 0, 3, 3, 3, 1, 0, 1, 1, 0, 0, 7, 7, 7, 7, 0, 0, 7, 7, 8, 0],
    [2, 2, 2, 2, 5, 5, 5, 5, 5, 0, 0, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4],
]
# Row 0 begins with padding in the state's document, row 1 with another document.
PACKED = Documents(np.array(ROWS, np.int32), np.array([3, 9], np.int32))
WHOLE = Documents(np.ones((BATCH, LENGTH), np.int32), np.ones(BATCH, np.int32))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of each form."""
    if request.param == "tree":
        elsewhere_only(monkeypatch, average_op, scan_op)
    return request.param


def operands(
    *,
    length: int = LENGTH,
    weights: int = WIDTH,
    spread: float = 1.0,
    varying: bool = False,
    bonus: bool = True,
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
    return {name: a.astype(np.float32) for name, a in found.items()}


def start(weights: int = WIDTH) -> WeightedState:
    draw = np.random.default_rng(1)
    shapes = ((BATCH, HEADS, WIDTH), (BATCH, HEADS, weights))
    return WeightedState(*(draw.normal(size=s).astype(np.float32) for s in shapes))


def empty(weights: int = WIDTH) -> WeightedState:
    """Return the state of no token."""
    mean = np.zeros((BATCH, HEADS, WIDTH), np.float32)
    return WeightedState(mean, np.full((BATCH, HEADS, weights), EMPTY, np.float32))


def cotangent(o: Operands) -> WeightedOutput:
    """Weigh all entries of the outputs differently, so that no error cancels in the sum."""
    shapes = (o["v"].shape, (BATCH, HEADS, WIDTH), (BATCH, HEADS, o["k"].shape[-1]))
    y, mean, total = (np.cos(np.arange(np.prod(s)), dtype=np.float32).reshape(s) for s in shapes)
    return WeightedOutput(y, WeightedState(mean, total))


def of_outputs(o: Operands) -> WeightedOutput:
    """Weigh the averages only."""
    y, state = cotangent(o)
    return WeightedOutput(y, jax.tree.map(np.zeros_like, state))


def call(name: str, o: Any, state: Any, documents: Any = None, **options: Any) -> WeightedOutput:
    if documents is not None:
        options |= {"segment_ids": documents.ids, "initial_segment": documents.initial}
    options |= {"bonus": o.get("u"), "initial_state": state, **FORMS[name]}
    return weighted_average(o["v"], o["k"], o["w"], **options)


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """Return outputs, and gradients of operands and state by the given weights of outputs."""

    def run(o: Any, state: Any, documents: Any, weights: Any) -> Any:
        out, pull = jax.vjp(lambda o, state: call(name, o, state, documents), o, state)
        return out, pull(weights)

    return jax.jit(run)


def seen(documents: Documents) -> np.ndarray:
    """Return which tokens are in the average after each token; the state is one more in front."""
    found = np.zeros((BATCH, LENGTH, 1 + LENGTH), bool)
    for row, names in enumerate(documents.ids):
        document, members = documents.initial[row], [0]
        for t, name in enumerate(names):
            if name not in (0, document):
                document, members = name, []
            if name:
                members.append(1 + t)
            found[row, t, members] = True
    return found


@jax.jit
def definition(o: Any, state: Any, mask: Any, valid: Any, weights: Any) -> Any:
    """Give every pair of tokens its weight, from all tokens for every token anew: O(T^2).

    Returns averages without and with the bonus and the state, and their gradients.
    """
    own = jnp.eye(LENGTH, 1 + LENGTH, 1, dtype=bool)[:, :, None, None]
    mask, valid = mask[..., None, None], valid[..., None, None]

    def run(o: Any, state: Any) -> Any:
        w = jnp.where(valid, o["w"], 0.0)
        v = jnp.concatenate([state.mean[:, None], o["v"]], axis=1)
        k = jnp.concatenate([state.log_total[:, None], o["k"]], axis=1)
        clock = jnp.concatenate([0 * w[:, :1], jnp.cumsum(w, axis=1)], axis=1)
        age = clock[:, 1:, None] - clock[:, None]  # [B T S H V]: decays after s up to t
        logs = jnp.where(mask, age + k[:, None], -jnp.inf)
        totals = jax.nn.logsumexp(logs, axis=2)
        means = jnp.einsum("btshv,bshv->bthv", jnp.exp(logs - totals[:, :, None]), v)
        # In its own output a token has its bonus, and the decay of this step is still to come.
        logs = jnp.where(own, (o["u"] + o["k"])[:, :, None], logs - w[:, :, None])
        logs = jnp.where(mask, logs, -jnp.inf)
        boosted = jnp.einsum("btshv,bshv->bthv", jax.nn.softmax(logs, axis=2), v)
        y = (jnp.where(valid, a, 0.0) for a in (means, boosted))
        return *y, WeightedState(means[:, -1], totals[:, -1])

    out, pull = jax.vjp(run, o, state)
    return out, pull(weights)


def exact(
    o: Operands, state: WeightedState, documents: Documents, weights: WeightedOutput
) -> tuple[WeightedOutput, tuple[dict[str, np.ndarray], WeightedState]]:
    """Return outputs and gradients in float64: one program for all shapes of the operands."""
    with jax.enable_x64(True):
        wide = {n: np.broadcast_to(o.get(n, 0.0), o["v"].shape).astype(float) for n in "vkwu"}
        many = WeightedState(*(np.broadcast_to(a, state.mean.shape).astype(float) for a in state))
        total = np.zeros(many.mean.shape)  # of several totals that are one, the first has a weight
        total[..., : weights.state.log_total.shape[-1]] = weights.state.log_total
        y, none = weights.y.astype(float), np.zeros(o["v"].shape)
        by = (none, y) if "u" in o else (y, none)
        by = (*by, WeightedState(weights.state.mean.astype(float), total))
        found = definition(wide, many, seen(documents), documents.ids != 0, by)
        (plain, boosted, after), (grads, by_state) = jax.tree.map(np.asarray, found)
    after = WeightedState(after.mean, after.log_total[..., : o["k"].shape[-1]])
    grads = {n: summed(grads[n], a.shape) for n, a in o.items()}
    by_state = WeightedState(*(summed(g, a.shape) for g, a in zip(by_state, state, strict=True)))
    return WeightedOutput(boosted if "u" in o else plain, after), (grads, by_state)


def summed(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the gradient of what was broadcast from a shape."""
    whole = (1,) * (a.ndim - len(shape)) + shape
    axes = tuple(n for n, size in enumerate(whole) if size != a.shape[n])
    return np.sum(a, axis=axes).reshape(shape)


def check(name: str, o: Operands, state: WeightedState | None, documents: Any = None) -> None:
    weights = cotangent(o)
    out, grads = compiled(name)(o, state, documents, weights)
    before = empty(o["k"].shape[-1]) if state is None else state
    expected, expected_grads = exact(o, before, documents or WHOLE, weights)
    assert_close(out, expected, FORWARD)
    assert_close(grads, expected_grads if state else (expected_grads[0], None), GRADIENT)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_a_constant_decay_per_channel(form: str, spread: float):
    check(form, operands(spread=spread), start())


def test_documents_and_a_weight_per_head(form: str):
    check(form, operands(weights=1, varying=True), start(1), PACKED)


# What is special to `pallas` is the gated scan, which knows neither log-weights nor a bonus.
@pytest.mark.parametrize("form", ["steps", "tree", "reference"], indirect=True)
def test_decays_of_each_token_with_a_bonus_and_without(form: str):
    check(form, operands(spread=60.0, varying=True), start())
    for spread in (1.0, 60.0):  # gated keys
        check(form, operands(weights=1, spread=spread, varying=True, bonus=False), None)


@pytest.mark.parametrize("form", ["steps", "tree", "reference"], indirect=True)
def test_one_token(form: str):
    """Without a state it is its own average, with its own weight."""
    o = operands(length=1)
    weights = cotangent(o)
    out, (grads, _) = compiled(form)(o, None, None, weights)
    v, k, (y, state) = o["v"], o["k"], weights
    assert_close(out, WeightedOutput(v, WeightedState(v[:, 0], k[:, 0])), FORWARD)
    expected = {n: np.zeros_like(a) for n, a in o.items()}
    expected |= {"v": y + state.mean[:, None], "k": state.log_total[:, None]}
    assert_close(grads, expected, GRADIENT)


def test_nothing_in_padding_reaches_real_tokens(form: str):
    o = operands(weights=1, varying=True)
    o["u"] = np.broadcast_to(o["u"], o["k"].shape)
    padding = (PACKED.ids == 0)[..., None, None]
    nan = {name: np.where(padding, np.float32(np.nan), a) for name, a in o.items()}
    found, expected = (compiled(form)(given, start(1), PACKED, cotangent(o)) for given in (nan, o))
    assert_close(found[0], expected[0], FORWARD)
    assert_close(found[1], expected[1], GRADIENT)
    np.testing.assert_array_equal(np.asarray(expected[0].y)[PACKED.ids == 0], 0.0)


def test_two_halves_are_one_call(form: str):
    """Each half is padding in the call of the other; the state and its gradient are handed on."""
    o, cut = operands(weights=1, varying=True), np.arange(LENGTH) < 5
    first = Documents(np.where(cut, PACKED.ids, 0), PACKED.initial)
    at_cut = np.array([3, 5], np.int32)
    second = Documents(np.where(cut, 0, PACKED.ids), at_cut)
    run, weights = compiled(form), cotangent(o)
    y, (grads, by_state) = run(o, start(1), PACKED, weights)
    early, _ = run(o, start(1), first, weights)
    late, (late_grads, between) = run(o, early.state, second, weights)
    _, (early_grads, by_start) = run(o, start(1), first, WeightedOutput(weights.y, between))
    parts = WeightedOutput(early.y + late.y, late.state)
    assert_close(parts, y, FORWARD)
    assert_close(jax.tree.map(np.add, early_grads, late_grads), grads, GRADIENT)
    assert_close(by_start, by_state, GRADIENT)
    assert np.max(np.abs(by_state.mean[0])) > 0
    np.testing.assert_array_equal(by_state.mean[1], 0.0)


def test_extremes_are_finite(form: str):
    o = operands()
    still = dict(o, w=0 * o["w"], k=0 * o["k"])
    forgetful = dict(o, w=np.full_like(o["w"], -1e30))
    huge = dict(o, k=np.float32(1e20) * o["k"])
    for extreme in (still, forgetful, huge):
        found = compiled(form)(extreme, empty(), None, cotangent(o))
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(found))


def test_only_padding_leaves_no_token(form: str):
    o = operands(weights=1, varying=True)
    nothing = Documents(np.zeros_like(PACKED.ids), PACKED.initial)
    (y, state), _ = compiled(form)(o, empty(1), nothing, cotangent(o))
    np.testing.assert_array_equal(y, 0.0)
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
    o = operands()
    weights = of_outputs(o)

    def having(first: float, rest: float, w: float) -> Operands:
        k = np.where(np.arange(LENGTH)[:, None, None] < 3, first, rest)
        k = np.broadcast_to(k, o["k"].shape).astype(np.float32)
        return o | {"k": k, "w": np.full_like(o["w"], w)}

    found, expected = [], []
    for logs in EXTREMES:
        extreme, plain = (having(*side) for side in logs)
        (y, _), (grads, _) = compiled(form)(extreme, empty(), None, weights)
        found.append((y, grads))
        (y, _), (grads, _) = exact(plain, empty(), WHOLE, weights)
        # Beyond the largest size there is no slope.
        slopes = {n: np.where(np.isfinite(extreme[n]), a, 0.0) for n, a in grads.items()}
        expected.append((y, slopes))
    (y, grads), (expected_y, expected_grads) = (
        jax.tree.map(lambda *cases: np.stack(cases), *side) for side in (found, expected)
    )
    assert_close(y, expected_y, FORWARD)
    assert_close(grads, expected_grads, GRADIENT)


def test_half_precision_is_computed_in_float32():
    o = {n: a.astype(jnp.bfloat16) for n, a in operands(varying=True).items()}
    wide = {n: a.astype(np.float32) for n, a in o.items()}
    run = jax.jit(
        lambda *given: [weighted_average(a["v"], a["k"], a["w"], bonus=a["u"]) for a in given]
    )
    (y, state), (expected, _) = run(o, wide)
    assert y.dtype == jnp.bfloat16
    assert state.mean.dtype == state.log_total.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.asarray(expected).astype(jnp.bfloat16))


def test_transformations():
    """Vmap, scan and checkpoint together; shards are in test_parity_scan_transforms.py."""
    o = operands(varying=True)
    rows = o | {n: o[n][:, None] for n in "vkw"}

    def loss(o: Any) -> jax.Array:
        y, _ = call("steps", o, None)
        return jnp.sum(jnp.sin(y))

    def transformed(o: Any) -> jax.Array:
        each = jax.vmap(jax.checkpoint(loss), ({"v": 0, "k": 0, "w": 0, "u": None},))
        total, _ = jax.lax.scan(lambda s, _: (s + jnp.sum(each(o)), None), 0.0, None, 2)
        return total / 2

    run = jax.jit(
        lambda *given: [
            jax.value_and_grad(f)(a) for f, a in zip((loss, transformed), given, strict=True)
        ]
    )
    (value, grads), (found, found_grads) = run(o, rows)
    assert_close(found, value, FORWARD)
    assert_close({n: found_grads[n].reshape(a.shape) for n, a in o.items()}, grads, GRADIENT)


def test_config_and_interpret_are_those_of_the_scan(monkeypatch: pytest.MonkeyPatch):
    o, given = operands(bonus=False), []

    def scan(*args: Any, **options: Any) -> Any:
        given.append((options["config"], options["interpret"]))
        return scan_op.gated_scan(*args, **options)

    monkeypatch.setattr(average_op, "gated_scan", scan)
    run = jax.jit(
        lambda o: [call(name, o, None, interpret=True) for name in ("pallas", "reference")]
    )
    found, expected = run(o)
    assert_close(found, expected, FORWARD)
    assert given == [(TILES, True)]
    y, _ = run(dict(o, w=np.full_like(o["w"], -1e30)))[0]  # all is forgotten at once
    assert_close(y, o["v"], FORWARD)
    with pytest.raises(KernelUnsupported, match="block=48, which is no power of two"):
        jax.eval_shape(
            lambda o: weighted_average(
                o["v"], o["k"], o["w"], implementation="pallas", config=GatedScanConfig(block=48)
            ),
            o,
        )


@pytest.mark.parametrize("cut", [np.s_[:0], np.s_[:, :0]], ids=["no row", "no token"])
def test_nothing_changes_nothing(cut: Any):
    o = {n: a[cut] if n in "vk" else a for n, a in operands(length=5).items()}
    state = jax.tree.map(lambda a: a[: len(o["v"])], start())
    documents = Documents(np.ones(o["v"].shape[:2], np.int32), np.ones(len(o["v"]), np.int32))
    for name in ("steps", "reference", "pallas"):
        y, after = jax.jit(functools.partial(call, name))(o, state, documents)
        assert y.shape == o["v"].shape
        assert_close(after, state, FORWARD)


def test_bad_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    o = operands(varying=True)

    def traced(o: Operands, state: Any = None, name: str = "auto") -> None:
        jax.eval_shape(
            lambda o: weighted_average(
                o["v"], o["k"], o["w"], initial_state=state, implementation=name
            ),
            o,
        )

    with pytest.raises(ShapeError, match=r"an axis of values .* is empty"):
        traced(dict(o, v=o["v"][..., :0]))
    with pytest.raises(ShapeError, match=r"broadcast to \[B T H 1\] or \[B T H V\]"):
        traced(dict(o, w=o["w"][..., :2]))
    with pytest.raises(ShapeError, match=r"log_total has shape \(2, 2, 1\).*shape \(2, 2, 3\)"):
        traced(o, empty(1))
    with pytest.raises(KernelUnsupported, match="has no implementation 'cudnn'"):
        traced(o, name="cudnn")
