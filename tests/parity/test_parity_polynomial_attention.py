"""Polynomial attention against all pairs of tokens in float64."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, KernelUnsupported, ShapeError
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.polynomial_attention import PolynomialOutput, polynomial_attention
from tests.helpers.compare import FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.linear_attention import Operands, exact_series, waves

BATCH, LENGTH, HEADS, WIDTH = 2, 9, 2, 4
IDS = np.array([1, 1, 0, 2, 2, 0, 2, 2, 0])
FORMS = ["reference", "xla"]


def drawn(length: int = LENGTH, size: float = 1.0) -> Operands:
    draw = np.random.default_rng(length)
    shape = (BATCH, length, HEADS, WIDTH)
    q, k, v = (np.float32(draw.normal(size=shape)) for _ in range(3))
    gates = np.float32(-draw.exponential(size=shape[:3]))
    return Operands(np.float32(size) * q, k, v, gates, None)


@functools.cache
def compiled(implementation: str, clamp: float | None, terms: int | None) -> Callable[..., Any]:
    """Compile outputs, and the gradients of their sum by `waves`; terms may be Taylor's."""

    def both(given: Operands, table: Any) -> Any:
        def call(given: Operands) -> Any:
            options = {"clamp": clamp, "log_forget": given.log_decay, "scale": 0.5}
            options |= {"coefficients": terms or table, "implementation": implementation}
            return tuple(polynomial_attention(*given[:3], **options))

        outputs, pull = jax.vjp(call, given)
        return outputs, pull(waves(outputs))[0]

    return jax.jit(both)


def run(implementation: str, given: Operands, coefficients: Any, clamp: float | None = None) -> Any:
    if isinstance(coefficients, int):
        return compiled(implementation, clamp, coefficients)(given, None)
    return compiled(implementation, clamp, None)(given, np.float32(coefficients))


def compare(got: Any, given: Operands, coefficients: Any, clamp: float | None = None) -> None:
    """Compare outputs and gradients with all pairs in float64."""
    table = coefficients
    if isinstance(coefficients, int):
        table = np.array([1.0 / math.factorial(n) for n in range(coefficients)])
    outputs, grads = exact_series(table, 0.5, given, clamp)
    assert_close(got[0], outputs[:2], FORWARD)
    assert_close(got[1], grads, GRADIENT)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("coefficients", "clamp"),
    [
        (np.array([0.0, 1.0]), 0.25),
        (np.array([[0.5, 1.0], [1.0, -1.0], [0.25, 2.0]]), None),
        (5, None),
        (5, 0.25),
    ],
    ids=["power", "per_head", "taylor", "taylor_clamped"],
)
def test_forms(coefficients: Any, clamp: float | None, implementation: str):
    given = drawn()
    compare(run(implementation, given, coefficients, clamp), given, coefficients, clamp)


@pytest.mark.parametrize("length", [1, 150])
def test_one_token_and_several_blocks(length: int):
    given = drawn(length)
    compare(run("xla", given, 5, 0.25), given, 5, 0.25)


@pytest.mark.parametrize("implementation", FORMS)
def test_polynomials_forget_everything(implementation: str):
    given = drawn()
    gates = np.float32(0.01) * given.log_decay
    gates[0, 5], gates[1, 3] = -np.inf, -1e30
    finite = given._replace(log_decay=np.maximum(gates, -1e3))
    got = run(implementation, given._replace(log_decay=gates), 5)
    assert_close(got, run(implementation, finite, 5), GRADIENT)
    compare(got, finite, 5)


def test_eighty_terms_are_softmax_to_rounding_where_they_cancel():
    # Products down to -17 and up to 17: in float32 a plain sum has no correct digit below -16.
    given = drawn(40, size=12.0)
    products = np.einsum("bthk,bshk->bhts", given.q, given.k) / 2
    assert products.min() < -30.0
    scale = 0.5 * 17.0 / float(np.abs(products).max())

    @jax.jit
    def reads(q: Any, k: Any, v: Any) -> Any:
        def read(form: str) -> Any:
            options = {"coefficients": 80, "scale": scale, "implementation": form}
            sums = polynomial_attention(q, k, v, **options)
            return sums.y / sums.total[..., None]

        return {form: read(form) for form in FORMS}, attention(q, k, v, scale=scale)

    got, expected = jax.tree.map(np.asarray, reads(*given[:3]))
    assert_close(got["xla"], expected, Budget(rtol=1e-4, atol=2e-5, rms=5e-6))
    # The definition itself, added up term by term, shows what is to be avoided.
    errors = {form: np.max(np.abs(got[form] - expected)) for form in FORMS}
    assert errors["xla"] <= 1e-4 < errors["reference"]


def test_packed_rows_and_caches():
    given, terms = drawn(), np.array([1.0, 1.0, 1 / 2, 1 / 6])
    index = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))

    @jax.jit
    def read(given: Operands, places: Places) -> PolynomialOutput:
        options = {"coefficients": 4, "scale": 0.5, "places": places}
        return polynomial_attention(*given[:3], log_forget=given.log_decay, **options)

    ids = np.broadcast_to(IDS, index.shape)
    packed = read(given._replace(log_decay=None), Places(index, index, ids, ids))
    packed = jax.tree.map(np.asarray, packed)
    for document in (1, 2):
        at = np.flatnonzero(document == IDS)
        alone = jax.tree.map(lambda a, at=at: a[:, at], given)
        alone, _ = exact_series(terms, 0.5, alone._replace(log_decay=0.0 * alone.log_decay))
        assert_close((packed.y[:, at], packed.total[:, at]), alone[:2], FORWARD)
    np.testing.assert_array_equal(packed.y[:, IDS == 0], 0.0)
    # The last token as the only query of a cache with room to spare.
    room = jax.tree.map(lambda a: np.pad(a, [(0, 0), (0, 3), *[(0, 0)] * (a.ndim - 2)]), given)
    slots = np.broadcast_to(np.arange(LENGTH + 3), (BATCH, LENGTH + 3))
    ones = np.where(slots < LENGTH, 1, 0)
    last = Places(index[:, -1:], slots, ones[:, :1], ones)
    found = read(room._replace(q=given.q[:, -1:]), last)
    whole, _ = exact_series(terms, 0.5, given)
    assert_close(found.y, whole.y[:, -1:], FORWARD)


@pytest.mark.parametrize("implementation", FORMS)
def test_a_number_of_terms_may_be_numpys(implementation: str):
    def program(terms: Any) -> str:
        options = {"scale": 0.5, "coefficients": terms, "implementation": implementation}
        call = functools.partial(polynomial_attention, **options)
        return str(jax.make_jaxpr(call)(*drawn()[:3]))

    assert program(np.int64(5)) == program(5)


def test_bad_calls_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = np.ones((2, 3, 2, 4), np.float32)
    good = {"coefficients": 3, "scale": 1.0}

    def trace(q: Any, k: Any, v: Any, **options: Any) -> None:
        jax.eval_shape(lambda *rows: polynomial_attention(*rows, **options), q, k, v)

    trace(x, x, x, **good)
    with pytest.raises(ConfigError, match="0 terms"):
        trace(x, x, x, scale=1.0, coefficients=0)
    with pytest.raises(ShapeError, match=r"coefficients have shape \(3, 5\)"):
        trace(x, x, x, scale=1.0, coefficients=np.ones((3, 5)))
    with pytest.raises(ShapeError, match=r"coefficients have shape \(\). Pass \[N\]"):
        trace(x, x, x, scale=1.0, coefficients=np.ones(()))
    for shape in ((0,), (0, 2)):
        with pytest.raises(ConfigError, match="none at all"):
            trace(x, x, x, scale=1.0, coefficients=np.ones(shape))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"scale={scale} is not a finite number"):
            trace(x, x, x, scale=scale, coefficients=3)
    with pytest.raises(KernelUnsupported, match=r"no implementation 'pallas'.*xla, reference"):
        trace(x, x, x, implementation="pallas", **good)
    ids = np.ones((2, 3), np.float32)
    with pytest.raises(DTypeError, match="segment_ids is float32"):
        trace(x, x, x, places=Places(ids, ids, ids, ids), **good)
    with pytest.raises(ShapeError, match="without `places`"):
        trace(x, x[:, :2], x[:, :2], **good)
    with pytest.raises(ShapeError, match="keys that fit q"):
        trace(x, x[..., :3], x, **good)
    with pytest.raises(ConfigError, match="not a finite number"):
        trace(x, x, x, clamp=float("inf"), **good)
    with pytest.raises(DTypeError, match="int32"):
        trace(x.astype(np.int32), x, x, **good)
