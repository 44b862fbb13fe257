"""Small layers, their dtypes, and what they start from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.mixers.base import config_class
from jaxmem.nn import cache
from jaxmem.nn.heads import check_heads, merge_heads, split_heads
from jaxmem.nn.init import (
    decay_ladder,
    fan_in_init,
    gpt2_init,
    uniform,
    uniform_init,
    uniform_per_head,
)
from jaxmem.nn.layers import (
    Embedding,
    LayerNorm,
    Linear,
    NormType,
    build_norm,
    dropout,
    weight_dropout,
)

INIT = nnx.initializers.normal(0.5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear(use_bias: bool):
    layer = Linear(3, 2, use_bias=use_bias, init=INIT, rngs=nnx.Rngs(0))
    assert (layer.bias is not None) == use_bias
    if use_bias:
        layer.bias[...] = jnp.array([1.0, -1.0])
    x = jax.random.normal(jax.random.key(1), (4, 3))
    expected = np.asarray(x) @ np.asarray(layer.kernel[...]) + (
        np.array([1.0, -1.0]) if use_bias else 0.0
    )
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm_starts_as_the_identity_on_standard_rows(use_bias: bool):
    layer = LayerNorm(4, use_bias=use_bias)
    assert (layer.bias is not None) == use_bias
    row = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    np.testing.assert_allclose(layer(row), row, rtol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_a_kind(kind: NormType):
    norm = build_norm(kind, 2, eps=1.5, use_bias=False)
    x = jnp.array([[0.5, -0.5], [3.0, 1.0]])
    rms = math.sqrt(0.25 + 1.5), math.sqrt(5.0 + 1.5)
    layer = math.sqrt(0.25 + 1.5), math.sqrt(1.0 + 1.5)
    by, moved = (rms, 0.0) if kind == "rms" else (layer, 2.0)
    expected = [[0.5 / by[0], -0.5 / by[0]], [(3.0 - moved) / by[1], (1.0 - moved) / by[1]]]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)
    norm.weight[...] = jnp.array([2.0, 0.0])
    np.testing.assert_allclose(norm(x), expected * np.array([2.0, 0.0]), rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(norm))] == [(2,)]


def test_a_bias_may_start_from_a_draw():
    layer = Linear(3, 2000, use_bias=True, init=INIT, bias_init=uniform(0.25), rngs=nnx.Rngs(0))
    bias = np.asarray(layer.bias[...])
    assert 0.24 < np.max(bias) < 0.25
    assert -0.25 < np.min(bias) < -0.24
    plain = Linear(3, 2000, use_bias=True, init=INIT, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(plain.kernel[...], layer.kernel[...])


def test_embedding_beyond_the_table_is_nan():
    table = Embedding(5, 3, init=INIT, rngs=nnx.Rngs(0))
    out = table(jnp.array([0, 4, 5]))
    np.testing.assert_array_equal(out[:2], table.table[...][jnp.array([0, 4])])
    np.testing.assert_array_equal(out[2], np.nan)


def test_logits_of_half_precision_are_float32():
    table = Embedding(5, 64, init=INIT, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 64))
    np.testing.assert_allclose(table.logits(x), x @ table.table[...].T, rtol=1e-5, atol=1e-5)
    assert table.logits(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert table(jnp.array([0]), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_dropout():
    x = jnp.ones((200, 200), jnp.bfloat16)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, nnx.Rngs(dropout=0)) is x
    y = dropout(x, 0.25, nnx.Rngs(dropout=0))
    assert y.dtype == jnp.bfloat16
    values, counts = np.unique(np.asarray(y, np.float32), return_counts=True)
    np.testing.assert_allclose(values, [0.0, 4 / 3], rtol=4e-3)  # bfloat16
    assert abs(counts[0] / y.size - 0.25) < 4 * np.sqrt(0.25 * 0.75 / y.size)


def test_weight_dropout_is_none_in_evaluation():
    assert weight_dropout(0.5, None) is None
    assert weight_dropout(0.0, nnx.Rngs(dropout=0)) is None
    rngs = nnx.Rngs(dropout=0)
    first, second = weight_dropout(0.5, rngs), weight_dropout(0.5, rngs)
    assert first.rate == 0.5
    assert first.key != second.key


def test_heads():
    x = jnp.arange(12.0).reshape(1, 2, 6)
    heads = split_heads(x, 3)
    np.testing.assert_array_equal(heads[0, 0], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(merge_heads(heads), x)


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_must_divide_the_width(heads: int):
    check_heads(12, 6, "model.mixer")
    with pytest.raises(ConfigError, match=rf"model\.mixer\.num_heads={heads} .*Use one of 1, 2, 3"):
        check_heads(12, heads, "model.mixer")


def test_initialisers():
    init = gpt2_init(8)
    key = jax.random.key(0)
    draws = [np.std(f(key, (300, 300), jnp.float32)) for f in init]
    np.testing.assert_allclose(draws, [0.02, 0.02 / 4, 0.02, 0.02], rtol=0.02)
    init = fan_in_init(4)
    draws = [np.std(f(key, (400, 100), jnp.float32)) for f in init]
    np.testing.assert_allclose(draws, [1 / 20, 1 / 40, 1.0, 1 / 10], rtol=0.02)
    init = uniform_init()
    draws = [np.asarray(f(key, (400, 100), jnp.float32)) for f in init]
    spreads = [1 / 20 / math.sqrt(3), 1 / 20 / math.sqrt(3), 0.02, 0.02]
    np.testing.assert_allclose([np.std(d) for d in draws], spreads, rtol=0.02)
    for draw in draws[:2]:
        assert 0.0499 < np.max(np.abs(draw)) <= 0.05
    np.testing.assert_allclose(decay_ladder(4), [0.05, 0.2, 0.35, 0.5], rtol=1e-6)
    uniform = uniform_per_head(key, 1000)
    assert 0.0 <= float(jnp.min(uniform)) < 0.05
    assert 0.95 < float(jnp.max(uniform)) < 1.0


@pytest.mark.parametrize("length", [None, 0, -1])
def test_a_cache_needs_a_length(length: int | None):
    assert cache.required_len(3, "mha") == 3
    with pytest.raises(ShapeError, match=f"init_state of mha needs max_len.*found {length}"):
        cache.required_len(length, "mha")


def test_overrun_is_more_than_full():
    buffer = jnp.zeros((3, 4, 2))
    np.testing.assert_array_equal(cache.overrun(jnp.array([3, 4, 5]), buffer), [False, False, True])


def test_continued_documents():
    segment = jnp.array([0, 7])
    np.testing.assert_array_equal(cache.continued(None, segment, 2), [[1, 1], [7, 7]])
    given = jnp.array([[3, 0], [0, 0]])
    assert cache.continued(given, segment, 2) is given


@pytest.mark.parametrize("name", ["contextual_memory", "persistent_memory", "mha", "mlp"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_dropout_must_be_a_share(name: str, rate: float):
    config = config_class(name)(dropout=rate)
    with pytest.raises(ConfigError, match=r"model\.mixer\.dropout=.*\[0, 1\)"):
        config.check(32, "model.mixer")
