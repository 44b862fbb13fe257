"""Attention at the limits of what it takes: scales, windows and gates of any size, in all forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops import attention_blocked, attention_xla
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.attention_terms import LOWEST_GATE
from pallas_kernels.pairs import PairTiles
from tests.helpers.attention import Inputs, Size, check, direct, inputs, rows_visible, run
from tests.helpers.compare import Budget

EPS = 2.0**-24
SCALES = np.exp([0.0, 2.0, 4.0, 8.0, 12.0, 16.0, 18.0, 20.0, 22.0])
"""Up to the largest scale that `ContextualMemoryConfig.scale_limit` allows."""
TILES = PairTiles(
    block_q=16,
    block_k=16,
    num_warps=4,
    num_stages=2,
    backward_q=16,
    backward_k=16,
    backward_warps=4,
    backward_stages=2,
)


@pytest.fixture(params=["at once", "blocked", "reference", "pallas"])
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What to ask for a form by; `xla` stands for two, of short and of long rows."""
    form = {"at once": "xla", "blocked": "xla"}.get(request.param, request.param)
    if form == "xla":
        blocked = request.param == "blocked"
        monkeypatch.setattr(attention_xla, "fits_at_once", lambda q, k: not blocked)
    if request.param == "blocked":
        monkeypatch.setattr(attention_blocked, "block_of", lambda length: min(length, 16))
    return {"implementation": form, **({"config": TILES} if form == "pallas" else {})}


def test_an_error_is_no_more_than_a_scale_costs(options: dict[str, Any]):
    """Of weights about scale times the epsilon of float32; of gradients of q and k, scale as large.

    Where that exceeds 1, rounding decides which key is nearest: results are then finite, and as
    large as some weights between 0 and 1 make them.
    """
    size = Size(batch=1, length=150, heads=1, groups=1)
    args = inputs(size)
    unit = args.q / jnp.linalg.norm(args.q, axis=-1, keepdims=True)
    visible = rows_visible(size, lag=1)

    @jax.jit
    def outputs(scale: jax.Array) -> tuple[jax.Array, Any]:
        def loss(q: Any, k: Any, v: Any, scale: Any) -> Any:
            y = attention(q, k, v, scale=scale, lag=1, **options)
            return jnp.vdot(y, jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        every = (0, 1, 2, 3)
        (_, y), grads = jax.value_and_grad(loss, every, has_aux=True)(unit, unit, args.v, scale)
        return y, grads

    for scale in SCALES.astype(np.float32):
        y, grads = jax.tree.map(np.asarray, outputs(jnp.full(1, scale)))
        assert all(np.all(np.isfinite(a)) for a in (y, *grads)), scale
        wanted, wanted_grads = direct(
            Inputs(unit, unit, args.v, np.full(1, scale)), visible, of_lse=False
        )
        cost = min(4 * scale * EPS, 2.0) + 4e-7
        largest = np.max(np.abs(args.v))
        assert np.max(np.abs(y - wanted.y)) <= cost * largest, scale
        # A gradient adds up to 149 such errors, which have all signs.
        reach = 4 * largest
        for name, unit_of in (("v", 1.0), ("q", scale), ("k", scale), ("scale", 149.0)):
            error = getattr(Inputs(*grads), name) - getattr(wanted_grads, name)
            assert np.max(np.abs(error)) <= cost * unit_of * reach * np.sqrt(16), (scale, name)


@pytest.mark.parametrize("window", [37, 38, 2**31 - 1, 2**31, 2**40], ids=str)
def test_a_window_over_all_is_none(options: dict[str, Any], window: int):
    size = Size(batch=1, length=37)
    args = inputs(size)
    rule = {"lag": 1, **options}
    found, expected = run(args, window=window, **rule), run(args, **rule)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("window", [3000, 2**31 - 1, 2**31, 2**40], ids=str)
def test_a_window_over_all_places_is_none(options: dict[str, Any], window: int):
    """Places may be further apart than there are tokens."""
    size = Size(batch=1, length=5, keys=19)
    args = inputs(size)
    queries, keys = jnp.arange(2000, 2005)[None], 100 * jnp.arange(19)[None]
    places = Places(queries, keys, jnp.ones_like(queries), jnp.ones_like(keys))
    rule = {"places": places, **options}
    found = run(args, window=window, **rule)
    check(found, direct(args, np.ones((1, 5, 19), bool)))


@pytest.mark.parametrize("lag", [0, 1])
def test_gates_that_let_nothing_pass(options: dict[str, Any], lag: int):
    """They are the limit of low ones: a query that sees keys before one only still reads them."""
    size = Size(batch=2, length=37)
    args = inputs(size, gated=True)
    shut = np.zeros((2, 37, 2), bool)
    shut[:, (5, 16, 17)] = shut[0, 30:, 1] = True
    finite = args._replace(log_forget=np.where(shut, LOWEST_GATE, args.log_forget))
    outputs, expected = direct(finite, rows_visible(size, lag=lag))
    low = args._replace(log_forget=np.where(shut, -1e4, args.log_forget))
    assert np.allclose(outputs.y, direct(low, rows_visible(size, lag=lag))[0].y, atol=1e-12)
    expected = expected._replace(log_forget=np.where(shut, 0.0, expected.log_forget))
    infinite = args._replace(log_forget=jnp.where(shut, -jnp.inf, args.log_forget))
    found = run(infinite, lag=lag, **options)
    if lag == 0:
        check(found, (outputs, expected))
    else:  # logits of -2048, whose last bit is 1.2e-4
        budget = Budget(rtol=1e-3, atol=3e-4, rms=2e-4)
        check(found, (outputs, expected), budget, budget)
