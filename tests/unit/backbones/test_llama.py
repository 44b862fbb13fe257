"""The Llama 2 decoder: its sizes and its start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder
from jaxmem.backbones.llama import llama
from jaxmem.errors import ConfigError
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.nn.layers import RMSNorm
from tests.helpers.compare import FORWARD, assert_close
from tests.helpers.parameter_count import parameter_count


@pytest.mark.parametrize(
    ("dim", "hidden", "heads", "depth", "millions"),
    [
        (1024, 2048, 16, 20, 275.293),
        (1536, 3072, 24, 27, 735.398),
        (1536, 3072, 24, 20, 570.226),
        (3072, 6144, 16, 20, 2084.171),
        (1024, 2048, 32, 60, 694.806),
    ],
    ids=["small", "medium", "medium_wide", "large", "large_depth"],
)
def test_published_parameter_counts(dim: int, hidden: int, heads: int, depth: int, millions: float):
    config = llama(
        AttentionConfig(num_heads=heads),
        hidden_dim=hidden,
        vocab_size=32_000,
        context_len=2048,
        dim=dim,
        depth=depth,
    )
    count = parameter_count(config)
    tables = 2 * 32_000 * dim
    block = 4 * dim**2 + 3 * dim * hidden + 2 * dim  # attention, feed-forward, two norms
    assert count == tables + depth * block + dim
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_computes_its_equations(tied: bool):
    config = llama(
        AttentionConfig(num_heads=2),
        hidden_dim=24,
        norm_eps=0.01,
        tie_embedding=tied,
        vocab_size=11,
        dim=8,
        depth=2,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert (model.head is None) == tied
    tokens = np.random.default_rng(1).integers(0, 11, (2, 5), np.int32)

    def norm(x: jax.Array, layer: RMSNorm) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.01) * layer.weight[...]

    @jax.jit
    def run(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = model.embedding(tokens)
        for block in model.blocks:
            x = x + block.mixer(norm(x, block.norm_1)).y
            parts, y = block.feed_forward, norm(x, block.norm_2)
            gate, up = (y @ part.kernel[...] for part in (parts.gate, parts.up))
            x = x + (jax.nn.silu(gate) * up) @ parts.down.kernel[...]
        table = model.embedding.table if tied else model.head.table
        return model(tokens).logits, norm(x, model.norm) @ table[...].T

    assert_close(*run(model, tokens), FORWARD)


def test_it_has_no_biases_and_starts_uniform():
    model = Decoder(
        llama(AttentionConfig(num_heads=2), hidden_dim=128, vocab_size=100, dim=64, depth=2),
        rngs=nnx.Rngs(0),
    )
    limits = {"qkv/kernel": 1 / 8, "out/kernel": 1 / 8, "gate/kernel": 1 / 8, "up/kernel": 1 / 8}
    limits["down/kernel"] = 1 / math.sqrt(128)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = "/".join(map(str, path)), np.asarray(leaf[...])
        bound = [limit for suffix, limit in limits.items() if name.endswith(suffix)]
        if bound:
            assert 0.99 * bound[0] < np.max(np.abs(value)) <= bound[0], name
            assert np.std(value) == pytest.approx(bound[0] / math.sqrt(3), rel=0.03), name
        elif name.endswith("table"):
            assert np.std(value) == pytest.approx(0.02, rel=0.05), name
        else:
            assert name.split("/")[-2].startswith("norm"), name
            np.testing.assert_array_equal(value, 1.0)


def test_sizes_are_checked():
    with pytest.raises(ConfigError, match=r"model\.feed_forward\.hidden_dim=0"):
        llama(AttentionConfig(num_heads=2), hidden_dim=0, dim=8)
    with pytest.raises(ConfigError, match=r"model\.norm_eps=-1\.0"):
        llama(AttentionConfig(num_heads=2), hidden_dim=8, dim=8, norm_eps=-1.0)
