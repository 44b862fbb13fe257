"""Polynomial attention against all pairs of tokens in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, KernelUnsupported, ShapeError
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.polynomial_attention import polynomial_attention
from tests.helpers.compare import FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.linear_attention import functional

BATCH, LENGTH, HEADS, WIDTH = 2, 9, 2, 4
IDS = np.array([1, 1, 0, 2, 2, 0, 2, 2, 0])


def drawn(length: int = LENGTH, size: float = 1.0) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(length)
    shape = (BATCH, length, HEADS, WIDTH)
    q, k, v = (draw.normal(size=shape) for _ in range(3))
    return size * q, k, v, -draw.exponential(size=shape[:3])


def by_pairs(
    coefficients: np.ndarray, clamp: float | None, q: Any, k: Any, v: Any, gates: Any
) -> tuple[Any, Any]:
    """Return sums of values and of weights, power by power."""
    s = 0.5 * jnp.einsum("bthk,bshk->bhts", q, k)
    s = s if clamp is None else jnp.where(s > clamp, clamp, s)
    c = coefficients.reshape(coefficients.shape[0], -1, 1, 1)
    weights = sum(c[n] * s**n for n in range(c.shape[0])) + 0.0 * s
    passed = jnp.moveaxis(jnp.cumsum(gates, axis=1), 1, 2)
    seen = np.tril(np.ones(s.shape[2:], bool))
    apart = jnp.where(seen, passed[..., :, None] - passed[..., None, :], 0.0)
    weights = jnp.where(seen, weights * jnp.exp(apart), 0.0)
    return jnp.einsum("bhts,bshv->bthv", weights, v), jnp.moveaxis(jnp.sum(weights, -1), 1, 2)


def both(run: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
    def scalar(*operands: Any) -> tuple[Any, Any]:
        outputs = tuple(run(*operands))
        return functional(outputs), outputs

    grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True))
    (_, outputs), grads = grad(*operands)
    return outputs, grads


@pytest.mark.parametrize("implementation", ["reference", "xla"])
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
    compare(coefficients, clamp, implementation, LENGTH)


@pytest.mark.parametrize("length", [1, 150])
def test_one_token_and_several_blocks(length: int):
    compare(5, 0.25, "xla", length)


def compare(coefficients: Any, clamp: float | None, implementation: str, length: int) -> None:
    """Compare outputs and gradients with all pairs in float64."""
    operands = drawn(length)
    table = coefficients
    if isinstance(coefficients, int):
        table = np.array([1.0 / math.factorial(n) for n in range(coefficients)])
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(a, jnp.float64) for a in operands)
        expected = both(lambda *a: by_pairs(table, clamp, *a), exact)

    def run(q: Any, k: Any, v: Any, gates: Any) -> Any:
        c = coefficients if isinstance(coefficients, int) else jnp.asarray(table, jnp.float32)
        return polynomial_attention(
            q,
            k,
            v,
            coefficients=c,
            scale=0.5,
            clamp=clamp,
            log_forget=gates,
            implementation=implementation,
        )

    got = both(run, tuple(jnp.asarray(a, jnp.float32) for a in operands))
    assert_close(got[0], expected[0], FORWARD)
    assert_close(got[1], expected[1], GRADIENT)


def test_eighty_terms_are_softmax_to_rounding_where_they_cancel():
    # Products down to -17 and up to 17: in float32 a plain sum has no correct digit below -16.
    q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in drawn(40, size=12.0))
    products = np.einsum("bthk,bshk->bhts", q, k) / 2
    assert products.min() < -30.0
    shrink = 17.0 / float(np.abs(products).max())
    for form in ("xla", "reference"):
        options = {"coefficients": 80, "scale": 0.5 * shrink, "implementation": form}
        read = polynomial_attention(q, k, v, **options)
        got = read.y / read.total[..., None]
        expected = attention(q, k, v, scale=0.5 * shrink)
        if form == "xla":
            assert_close(got, expected, Budget(rtol=1e-4, atol=2e-5, rms=5e-6))
        # The definition itself, added up term by term, shows what is to be avoided.
        error = float(jnp.max(jnp.abs(got - expected)))
        assert (error > 1e-4) == (form == "reference")


def test_packed_rows_and_caches():
    q, k, v, gates = (jnp.asarray(a, jnp.float32) for a in drawn())
    ids = jnp.broadcast_to(IDS, (BATCH, LENGTH))
    index = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    options = {"coefficients": 4, "scale": 0.5}
    packed = polynomial_attention(q, k, v, places=Places(index, index, ids, ids), **options)
    for document in (1, 2):
        at = np.flatnonzero(document == IDS)
        alone = polynomial_attention(q[:, at], k[:, at], v[:, at], **options)
        assert_close(packed.y[:, at], alone.y, FORWARD)
        assert_close(packed.total[:, at], alone.total, FORWARD)
    np.testing.assert_array_equal(packed.y[:, IDS == 0], 0.0)
    # The last token as the only query of a cache with room to spare.
    ones = jnp.ones((BATCH, LENGTH + 3), jnp.int32).at[:, LENGTH:].set(0)
    room = [jnp.pad(a, ((0, 0), (0, 3), *((0, 0),) * (a.ndim - 2))) for a in (k, v, gates)]
    slots = jnp.broadcast_to(jnp.arange(LENGTH + 3), ones.shape)
    last = Places(index[:, -1:], slots, ones[:, :1], ones)
    read = polynomial_attention(
        q[:, -1:], room[0], room[1], places=last, log_forget=room[2], **options
    )
    whole = polynomial_attention(q, k, v, log_forget=gates, **options)
    assert_close(read.y[:, 0], whole.y[:, -1], FORWARD)


def test_a_number_of_terms_may_be_numpys():
    x = jnp.ones((2, 3, 2, 4))
    for form in ("xla", "reference"):
        got = polynomial_attention(
            x, x, x, scale=0.5, coefficients=np.int64(5), implementation=form
        )
        expected = polynomial_attention(x, x, x, scale=0.5, coefficients=5, implementation=form)
        np.testing.assert_array_equal(got.y, expected.y)


def test_bad_calls_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = jnp.ones((2, 3, 2, 4))
    good = {"coefficients": 3, "scale": 1.0}
    with pytest.raises(ConfigError, match="0 terms"):
        polynomial_attention(x, x, x, scale=1.0, coefficients=0)
    with pytest.raises(ShapeError, match=r"coefficients have shape \(3, 5\)"):
        polynomial_attention(x, x, x, scale=1.0, coefficients=jnp.ones((3, 5)))
    with pytest.raises(ShapeError, match=r"coefficients have shape \(\). Pass \[N\]"):
        polynomial_attention(x, x, x, scale=1.0, coefficients=jnp.ones(()))
    for shape in ((0,), (0, 2)):
        with pytest.raises(ConfigError, match="none at all"):
            polynomial_attention(x, x, x, scale=1.0, coefficients=jnp.ones(shape))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"scale={scale} is not a finite number"):
            polynomial_attention(x, x, x, scale=scale, coefficients=3)
    with pytest.raises(KernelUnsupported, match=r"no implementation 'pallas'.*xla, reference"):
        polynomial_attention(x, x, x, implementation="pallas", **good)
    ids = jnp.ones((2, 3))
    with pytest.raises(DTypeError, match="segment_ids is float32"):
        polynomial_attention(x, x, x, places=Places(ids, ids, ids, ids), **good)
    with pytest.raises(ShapeError, match="without `places`"):
        polynomial_attention(x, x[:, :2], x[:, :2], **good)
    with pytest.raises(ShapeError, match="keys that fit q"):
        polynomial_attention(x, x[..., :3], x, **good)
    with pytest.raises(ConfigError, match="not a finite number"):
        polynomial_attention(x, x, x, clamp=float("inf"), **good)
    with pytest.raises(DTypeError, match="int32"):
        polynomial_attention(x.astype(jnp.int32), x, x, **good)
