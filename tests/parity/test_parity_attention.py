"""The forms of attention in plain JAX against formulas in float64.

Every pair of what a call may have occurs in one of these calls: gates, gates of the values, a
clamp, dropout, a window, lags, documents, places of a cache, shared keys, half precision. Here or
in test_parity_attention_extremes.py, which has forget gates of rows, and a lag alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops.attention import Dropout, Places, attention, attention_with_lse
from jaxmem.ops.attention_terms import cumulative
from tests.helpers.attention import (
    PLAIN,
    Inputs,
    Size,
    check,
    direct,
    factors,
    inputs,
    rows_visible,
    run,
    with_whole_dots,
)
from tests.helpers.compare import BFLOAT16, FORWARD, Budget, assert_close

SMALL = Size(batch=3, length=7, width=5, value_width=3)
SHARED = Size(length=11, heads=4, groups=2, width=5, value_width=3)
HALF_GRADIENT = Budget(rtol=5e-2, atol=5e-2, rms=2e-2)
every_form = pytest.mark.parametrize("form", PLAIN)


@functools.cache
def dropout() -> Dropout:
    return Dropout(0.3, jax.random.key(5))


def unread(grads: Inputs, visible: np.ndarray) -> None:
    """Check that keys which nobody sees have no gradient at all."""
    for grad in (grads.k, grads.v, grads.value_gate):
        if grad is not None:
            np.testing.assert_array_equal(np.float32(grad)[~visible.any(1)], 0.0)


@every_form
def test_nothing_but_order(form: str):
    args = inputs(SMALL)
    check(run(args, form), direct(args, rows_visible(SMALL)))


@every_form
@pytest.mark.parametrize(
    ("dtypes", "rule"),
    [
        ((jnp.bfloat16, jnp.bfloat16), {"lag": 2}),
        ((jnp.float32, jnp.bfloat16), {"lag": 1, "window": 3}),
    ],
    ids=["bfloat16", "float32-keys"],
)
def test_half_precision_values(form: str, dtypes: Any, rule: dict[str, Any]):
    args = inputs(SMALL, dtypes=dtypes)
    outputs, grads = run(args, form, **rule)
    assert (outputs.y.dtype, outputs.lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in grads[:3]] == [dtypes[0], *dtypes]
    visible = rows_visible(SMALL, **rule)
    check((outputs, grads), direct(args, visible), BFLOAT16, HALF_GRADIENT)
    unread(grads, visible)


@every_form
def test_everything_at_once(form: str):
    """Packed documents with padding, a window, shared keys, gates of both kinds and dropout.

    A quarter of the logits exceed the clamp.
    """
    size = Size(batch=2, length=19, heads=4, groups=2, width=6, value_width=5)
    segments = [[1] * 4 + [2] * 7 + [0] * 2 + [3] * 6, [0] * 3 + [7] * 5 + [4] * 11]
    rule = {"lag": 1, "window": 5}
    args = inputs(size, gated=True, value_gated=True)
    options = {"segment_ids": np.array(segments), "dropout": dropout(), "clamp": 0.9, **rule}
    visible = rows_visible(size, segments=segments, **rule)
    expected = direct(args, visible, factors(size, dropout()), clamp=0.9)
    check(run(args, form, **options), expected)


QUERY = np.array([[4, 5, 6], [6, 7, 8], [0, 1, 2]])
KEY = np.tile(np.arange(9), (3, 1))
QUERY_SEGMENT = np.array([[2, 2, 2], [1, 0, 1], [1, 1, 1]])
KEY_SEGMENT = np.array([[1] * 3 + [2] * 4 + [0] * 2, [1] * 9, [0] * 9])
"""Three queries over nine slots: rows at different lengths, two documents, unused slots."""


def seen_in_cache(lag: int, window: float = np.inf) -> np.ndarray:
    behind = QUERY[:, :, None] - KEY[:, None]
    same = KEY_SEGMENT[:, None] == QUERY_SEGMENT[:, :, None]
    return (lag <= behind) & (behind < window) & same & (KEY_SEGMENT[:, None] != 0)


@every_form
def test_places_in_a_cache_with_gates(form: str):
    """Gates stand in the slots of their places; so do queries among them."""
    size = Size(batch=3, length=3, keys=9, heads=4, groups=2, width=5, value_width=3)
    args, rule = inputs(size, gated=True), {"lag": 1, "window": 3}
    places = Places(QUERY, KEY, QUERY_SEGMENT, KEY_SEGMENT)
    found = run(args, form, places=places, dropout=dropout(), **rule)
    visible = seen_in_cache(**rule)
    check(found, direct(args, visible, factors(size, dropout()), slots=QUERY))
    unread(found[1], visible)


@every_form
def test_places_far_apart_in_a_cache_with_a_clamp(form: str):
    """Places may be further apart than there are tokens; the window is wider still."""
    size = Size(batch=3, length=3, keys=9, width=5, value_width=3)
    places = Places(200 * QUERY, 200 * KEY, QUERY_SEGMENT, KEY_SEGMENT)
    args = inputs(size)
    found = run(args, form, window=3000, clamp=-0.3, places=places)
    visible = seen_in_cache(lag=0)
    check(found, direct(args, visible, clamp=-0.3))
    unread(found[1], visible)


@every_form
@pytest.mark.parametrize("scale", [5 / 16, 64.0], ids=["at", "beyond"])
def test_logits_at_the_clamp_and_far_beyond(form: str, scale: float):
    """Logits that equal the clamp pass their gradient; they may reach 1e3."""
    clamp = 3 * 5 / 16
    args = with_whole_dots(inputs(SHARED, value_gated=True), scale)
    visible = rows_visible(SHARED, lag=2)
    assert np.any(at_clamp(args, visible, clamp)) == (clamp % scale == 0.0)
    found = run(args, form, lag=2, clamp=clamp)
    check(found, direct(args, visible, clamp=clamp))
    unread(found[1], visible)


@every_form
def test_logits_at_a_large_clamp(form: str):
    args = with_whole_dots(inputs(SHARED), 64.0)
    visible = rows_visible(SHARED)
    assert np.any(at_clamp(args, visible, 640.0))
    # A float32 of 640, as the log-sum-exp is here, is known to 3e-5; 6e-5 measured.
    budget = Budget(rtol=2e-4, atol=2e-4, rms=2e-4)
    found = run(args, form, clamp=640.0)
    check(found, direct(args, visible, clamp=640.0), gradient=budget)


def at_clamp(args: Inputs, visible: np.ndarray, clamp: float) -> np.ndarray:
    share = args.q.shape[2] // args.k.shape[2]
    logits = args.scale[0] * np.einsum("bthk,bshk->bhts", args.q, np.repeat(args.k, share, axis=2))
    return visible[:, None] & (logits == clamp)


def test_gates_of_a_long_row_keep_their_digits():
    gates = -np.random.default_rng(0).uniform(size=(1, 20_000, 1)).astype(np.float32)
    parts, plain = jax.jit(lambda x: (cumulative(x), jnp.cumsum(x, axis=1)))(gates)
    whole, rest = (np.float64(a) for a in parts)
    exact = np.cumsum(np.float64(gates), axis=1)
    assert np.max(np.abs(whole + rest - exact)) < 1e-5  # of sums up to 1e4
    assert np.max(np.abs(np.asarray(plain) - exact)) > 1e-3


def test_reads_of_two_halves_merge():
    index = np.tile(np.arange(SHARED.length), (2, 1))
    ones = np.ones_like(index)

    @jax.jit
    def reads(args: Inputs, *places: jax.Array) -> list[Any]:
        query, key, query_segment, key_segment = places
        options = {"scale": args.scale, "implementation": "xla"}

        def read(part: slice) -> Any:
            there = Places(query, key[:, part], query_segment, key_segment[:, part])
            return attention_with_lse(
                args.q, args.k[:, part], args.v[:, part], places=there, **options
            )

        return [read(slice(4)), read(slice(4, None)), read(slice(None))]

    found = jax.tree.map(np.asarray, reads(inputs(SHARED), index, index, ones, ones))
    first, second, whole = found
    assert np.all(second.lse[:, :4] == -np.inf)
    lse = np.logaddexp(first.lse, second.lse)
    y = sum(part.y * np.exp(part.lse - lse)[..., None] for part in (first, second))
    assert_close((y, lse), tuple(whole), FORWARD)


def test_long_rows_never_hold_all_weights():
    """The program of a long row has no array of (T, S); neither has its gradient."""
    arrays = [jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32)] * 3

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attention(*arrays, scale=1.0, implementation="xla"))

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).as_text()
    assert "1024x1024" not in text
    assert "128x128" in text
