"""Attention at the limits of what it takes: scales, windows and gates of any size, in all forms.

What a value makes extreme is data: a form runs one program for all scales, one for all gates of
rows, and one for gates where no query sees its own place.
"""

from typing import Any

import jax
import numpy as np
import pytest

from jaxmem.ops.attention import Places, attention_with_lse
from jaxmem.ops.attention_terms import LOWEST_GATE
from tests.helpers.attention import (
    FORMS,
    Inputs,
    Size,
    check,
    direct,
    forced,
    inputs,
    rows_visible,
    run,
)
from tests.helpers.compare import FORWARD, GRADIENT, Budget, assert_close

EPS = 2.0**-24
SCALES = np.exp([0.0, 2.0, 4.0, 8.0, 12.0, 16.0, 18.0, 20.0, 22.0])
"""Up to the largest scale that `ContextualMemoryConfig.scale_limit` allows."""
ONE = Size(batch=1, length=150, heads=1, groups=1)
ROWS = Size(batch=2, length=300)
"""A row of several blocks and some tokens in every form."""
SHORT = Size(batch=2, length=37)
WINDOWS = {ONE: 2**40, ROWS: 2**31, SHORT: 37}
"""All of them over all of a row, so that nothing may come of them."""

pytestmark = pytest.mark.parametrize("form", FORMS)


def unit(a: np.ndarray) -> np.ndarray:
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def test_an_error_is_no_more_than_a_scale_costs(form: str):
    """Of weights about scale times the epsilon of float32; of gradients of q and k, scale as large.

    Where that exceeds 1, rounding decides which key is nearest: results are then finite, and as
    large as some weights between 0 and 1 make them.
    """
    args = inputs(ONE)
    args = args._replace(q=unit(args.q), k=unit(args.q))
    visible = rows_visible(ONE, lag=1)
    for scale in SCALES.astype(np.float32):
        args = args._replace(scale=np.full(1, scale))
        (y, _), grads = run(args, form, lag=1, window=WINDOWS[ONE], of_lse=False)
        assert all(np.all(np.isfinite(a)) for a in (y, *grads[:4])), scale
        wanted, wanted_grads = direct(args, visible, of_lse=False)
        cost = min(4 * scale * EPS, 2.0) + 4e-7
        largest = np.max(np.abs(args.v))
        assert np.max(np.abs(y - wanted.y)) <= cost * largest, scale
        # A gradient adds up 149 such errors, which have all signs.
        reach = 4 * largest
        for name, unit_of in (("v", 1.0), ("q", scale), ("k", scale), ("scale", 149.0)):
            error = getattr(grads, name) - getattr(wanted_grads, name)
            assert np.max(np.abs(error)) <= cost * unit_of * reach * np.sqrt(16), (scale, name)


def test_logits_of_order_one_after_a_lag(form: str):
    args = inputs(ONE)
    found = run(args, form, lag=1, window=WINDOWS[ONE])
    check(found, direct(args, rows_visible(ONE, lag=1)))
    np.testing.assert_array_equal(found[1].k[:, -1], 0.0)  # nobody sees the last key
    np.testing.assert_array_equal(found[1].v[:, -1], 0.0)


def test_logits_of_ten_thousand(form: str):
    """So sharp a softmax returns the value of the nearest key seen."""
    args = inputs(ONE)
    args = args._replace(k=unit(args.k), scale=np.full(1, 1e4, np.float32))
    (y, _), grads = run(args, form, lag=1, window=WINDOWS[ONE])
    assert all(np.all(np.isfinite(a)) for a in (y, *grads[:4]))
    logits = np.einsum("bthk,bshk->bhts", *np.float64(args[:2]))
    logits[:, :, ~np.tri(ONE.length, k=-1, dtype=bool)] = -np.inf
    nearest = np.argmax(logits[0, 0, 2:], axis=-1)
    second, first = np.sort(logits[0, 0, 2:], axis=-1)[:, -2:].T
    sharp = 1e4 * (first - second) > 20.0
    assert np.mean(sharp) > 0.9
    assert_close(y[0, 2:, 0][sharp], args.v[0, nearest, 0][sharp], FORWARD)


@pytest.mark.parametrize("placed", [False, True])
def test_a_window_over_all_is_none(form: str, placed: bool):
    """The program is that of no window; places may be further apart than there are tokens.

    What such programs compute, the other tests here check, which have windows over all.
    """
    args, index = inputs(SHORT), np.tile(np.arange(37), (2, 1))
    places = Places(100 * index, 100 * index, *np.ones((2, 2, 37), int)) if placed else None

    def traced(window: int | None) -> str:
        def read(args: Inputs, places: Any) -> Any:
            given = {**options, "lag": 1, "window": window, "places": places}
            return attention_with_lse(**args._asdict(), **given)

        with forced(form) as options:
            return str(jax.make_jaxpr(read)(args, places))

    none = traced(None)
    for window in (*(() if placed else (37, 38)), 2**31 - 1, 2**31, 2**40):
        assert traced(window) == none, window
    assert traced(36) != none


def test_gates_that_let_all_or_nothing_pass(form: str):
    """For whole tiles and single tokens."""
    args = inputs(ROWS, gated=True)
    args.log_forget[:, (2, 5, 16)] = -1e4
    args.log_forget[:, (3, *range(20, 60))] = 0.0
    check(run(args, form, window=WINDOWS[ROWS]), direct(args, rows_visible(ROWS)))


def test_gradients_of_gates_that_forget_nearly_all(form: str):
    """They are e^-12 of what a token gives itself, whose rounding must not be among them."""
    args = inputs(ROWS)
    gates = -12.5 - np.random.default_rng(6).uniform(size=(*args.k.shape[:2], ROWS.heads))
    args = args._replace(scale=np.float32(0.05) * args.scale, log_forget=np.float32(gates))
    found, expected = run(args, form, window=WINDOWS[ROWS]), direct(args, rows_visible(ROWS))
    assert np.max(np.abs(expected[1].log_forget)) < 1e-4
    check(found, expected)


def test_gates_that_grow(form: str):
    """Older keys gain up to e^0.3 a token, so that they outweigh near ones by e^45 in the end."""
    args = inputs(ROWS)
    gates = 0.3 * np.random.default_rng(6).uniform(size=(*args.k.shape[:2], ROWS.heads))
    args = args._replace(log_forget=np.float32(gates))
    # A gate's gradient adds up what passes it, here nearly all of later rows, and their rounding.
    # Measured rms of kernels 1.2e-5 with 300 tokens on JAX 0.12, else below 8e-6.
    budget = GRADIENT._replace(rms=1.5e-5) if form == "pallas" else GRADIENT
    check(run(args, form, window=WINDOWS[ROWS]), direct(args, rows_visible(ROWS)), gradient=budget)


@pytest.mark.parametrize("lag", [0, 1])
def test_gates_that_let_nothing_pass(form: str, lag: int):
    """They are the limit of low ones: a query that sees keys before one only still reads them."""
    size = SHORT if lag else ROWS
    args = inputs(size, gated=True, value_gated=lag == 1)
    shut = np.zeros(args.log_forget.shape, bool)
    shut[:, (5, 16, 17)] = shut[0, 30:, 1] = True
    finite = args._replace(log_forget=np.where(shut, LOWEST_GATE, args.log_forget))
    outputs, expected = direct(finite, rows_visible(size, lag=lag))
    low = args._replace(log_forget=np.where(shut, -1e4, args.log_forget))
    assert np.allclose(outputs.y, direct(low, rows_visible(size, lag=lag))[0].y, atol=1e-12)
    expected = expected._replace(log_forget=np.where(shut, 0.0, expected.log_forget))
    infinite = args._replace(log_forget=np.where(shut, np.float32(-np.inf), args.log_forget))
    found = run(infinite, form, lag=lag, window=WINDOWS[size])
    if lag == 0:
        check(found, (outputs, expected))
    else:  # logits of -2048, whose last bit is 1.2e-4
        budget = Budget(rtol=1e-3, atol=3e-4, rms=2e-4)
        check(found, (outputs, expected), budget, budget)


def test_gates_of_both_kinds_after_a_lag(form: str):
    args = inputs(SHORT, gated=True, value_gated=True)
    found = run(args, form, lag=1, window=WINDOWS[SHORT])
    check(found, direct(args, rows_visible(SHORT, lag=1)))
    np.testing.assert_array_equal(found[1].value_gate[:, -1], 0.0)  # nobody sees the last key
