"""The persistent read in plain JAX against softmax in float64 written directly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.ops import persistent_read_xla as xla
from jaxmem.ops.attention import Dropout
from pallas_kernels.persistent_read import Operands
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, Budget, assert_close
from tests.helpers.persistent_read import (
    PLAIN,
    Inputs,
    Size,
    check_scales,
    direct,
    factors,
    inputs,
    run,
)

ONE_BANK = Size(length=70, pairs=53)
BANKS = Size(batch=3, length=50, heads=3, banks=3, pairs=18, width=5, value_width=4)
"""More than 128 queries each, which is a block where weights are many."""


def test_blocks_of_queries(monkeypatch: pytest.MonkeyPatch):
    """The last one is partly filled."""
    q, keys, values, scale = inputs(BANKS)
    flat = Operands(q.reshape(150, *q.shape[2:]), keys, values, scale)
    assert xla._blocks(flat) == (1, 150)
    monkeypatch.setattr(xla, "WEIGHTS_LIMIT", 0)
    assert xla._blocks(flat) == (2, 128)


def check(found: tuple, expected: tuple, *budgets: Budget) -> None:
    for part, wanted, budget in zip(found, expected, budgets or (FORWARD, GRADIENT), strict=True):
        assert_close(part, wanted, budget)


@pytest.mark.parametrize("form", PLAIN)
def test_one_bank(form: str):
    args = inputs(ONE_BANK)
    check(run(args, form), direct(args))


@pytest.mark.parametrize("form", PLAIN)
def test_an_error_is_no_more_than_a_scale_costs(form: str):
    check_scales(ONE_BANK, form)


@pytest.mark.parametrize("form", PLAIN)
def test_logits_of_ten_thousand(form: str):
    args = inputs(ONE_BANK)._replace(scale=np.full(2, 1e4, np.float32))
    y, grads = run(args, form)
    assert_close(y, direct(args)[0], FORWARD)
    assert all(np.all(np.isfinite(a)) for a in grads)


@pytest.mark.parametrize("form", PLAIN)
def test_dropout_is_a_function_of_the_place(form: str):
    args, dropout = inputs(BANKS), Dropout(0.4, jax.random.key(7))
    factor = factors(BANKS, dropout)
    assert abs(np.mean(factor == 0) - dropout.rate) < 0.05
    assert np.max(np.abs(direct(args, factor)[0] - direct(args)[0])) > 0.1
    check(run(args, form, dropout), direct(args, factor))


@pytest.mark.parametrize("form", PLAIN)
def test_half_precision_values(form: str):
    args = inputs(BANKS, (jnp.float32, jnp.bfloat16))
    y, grads = run(args, form)
    assert y.dtype == grads.values.dtype == jnp.bfloat16
    assert grads.q.dtype == grads.keys.dtype == grads.scale.dtype == jnp.float32
    check((y, grads), direct(args), BFLOAT16, BFLOAT16)


@pytest.mark.parametrize("form", PLAIN)
def test_double_precision(form: str):
    with jax.enable_x64(True):
        args = Inputs(*(np.float64(a) for a in inputs(BANKS)))
        found = run(args, form)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    exact = Budget(rtol=1e-11, atol=1e-12, rms=1e-12)
    check(found, direct(args), exact, exact)


def test_the_formulas_of_gradients_are_numerical_derivatives():
    """One random direction per input, in float64."""
    args = Inputs(*(np.float64(a) for a in inputs(BANKS)))
    y, grads = direct(args)
    cotangent = np.cos(np.arange(y.size)).reshape(y.shape)
    draw, step = np.random.default_rng(0), 1e-6
    for field in Inputs._fields:
        value = getattr(args, field)
        along = draw.normal(size=value.shape)
        ahead, behind = (
            np.sum(cotangent * direct(args._replace(**{field: value + sign * step * along}))[0])
            for sign in (1, -1)
        )
        slope = np.sum(along * getattr(grads, field))
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)
