"""Sampling: filters against their definition in numpy, draws against the target distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import ConfigError
from jaxmem.generate.sampling import Sampling, filter_logits, sample

LOGITS = np.array([2.0, -1.0, 1.5, 0.0, 1.5, -3.0, 0.7], np.float64)


def target(logits, sampling):
    """The distribution as defined: sequential filters, ties kept."""
    logits = logits / sampling.temperature
    kept = np.ones(len(logits), bool)
    probs = np.exp(logits) / np.exp(logits).sum()
    if sampling.top_k:
        kept &= probs >= np.sort(probs)[::-1][min(sampling.top_k, len(probs)) - 1]
        probs = np.where(kept, probs, 0) / probs[kept].sum()
    if sampling.top_p < 1:
        order = np.sort(probs)[::-1]
        number = np.argmax(np.cumsum(order) >= sampling.top_p - 1e-12) + 1
        kept &= probs >= order[number - 1]
        probs = np.where(kept, probs, 0) / probs[kept].sum()
    if sampling.min_p:
        kept &= probs >= sampling.min_p * probs.max()
        probs = np.where(kept, probs, 0) / probs[kept].sum()
    return probs


CASES = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=3.0),
    "top_k1": Sampling(top_k=1),
    "top_k2-tie": Sampling(top_k=2),
    "top_k-too-large": Sampling(top_k=99),
    "top_p": Sampling(top_p=0.6),
    "top_p-tiny": Sampling(top_p=1e-6),
    "min_p": Sampling(min_p=0.3),
    "min_p1": Sampling(min_p=1.0),
    "all": Sampling(temperature=1.3, top_k=5, top_p=0.9, min_p=0.1),
}


filtered = jax.jit(filter_logits, static_argnames="sampling")
drawn_from = jax.jit(sample, static_argnames="sampling")


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
def test_filter_gives_the_defined_distribution(sampling):
    found = np.exp(filtered(np.float32(LOGITS), sampling))
    np.testing.assert_allclose(found / found.sum(), target(LOGITS, sampling), atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "cold", "top_p", "all"])
def test_draws_follow_the_distribution(name):
    sampling, draws = CASES[name], 20_000
    logits = np.broadcast_to(np.float32(LOGITS), (draws, len(LOGITS)))
    drawn = drawn_from(logits, jax.random.key(3), sampling)
    counts = np.bincount(drawn, minlength=len(LOGITS))
    expected = target(LOGITS, sampling) * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    # Chi-squared with at most 6 degrees of freedom exceeds 22.5 once in a thousand keys.
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 22.5


def test_greedy_is_the_first_argmax_for_every_row_and_ignores_the_key():
    logits = np.float32([[0.0, 2.0, 2.0], [5.0, -1.0, 4.0]])
    for seed in range(3):
        sampling = Sampling(temperature=0, top_k=2, top_p=0.5)
        drawn = drawn_from(logits, jax.random.key(seed), sampling)
        assert drawn.tolist() == [1, 0]
        assert drawn.dtype == jnp.int32


def test_batch_rows_are_filtered_one_by_one():
    rows = np.float32(np.random.default_rng(0).normal(size=(2, 3, 9)))
    sampling = CASES["all"]
    whole = np.asarray(filtered(rows, sampling))
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(whole[index], filtered(rows[index], sampling))


def test_excluded_tokens_stay_excluded_under_bfloat16():
    logits = np.array([-np.inf, 1.0, 0.5], jnp.bfloat16)
    found = filtered(logits, Sampling(top_p=0.99, min_p=0.01, top_k=3))
    assert found[0] == -np.inf
    assert np.isfinite(found[1:]).all()
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Sampling(**{field: value})
