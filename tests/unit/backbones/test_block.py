"""Blocks: where the norm and the residual stand, and blocks of one slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.block import Block
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.nn.init import fan_in_init, uniform_init
from tests.helpers.compare import FORWARD, assert_close

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def block(norm: str, feed_forward: MLPConfig | None) -> Block:
    module = Block(
        ContextualMemoryConfig(num_heads=2),
        feed_forward,
        8,
        norm=norm,
        use_bias=False,
        init=fan_in_init(1),
        rngs=nnx.Rngs(0),
    )
    module.norm_1.weight[...] = jnp.linspace(0.5, 1.5, 8)
    return module


@pytest.mark.parametrize("feed_forward", [None, MLPConfig()], ids=["one", "two"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_its_equation(norm: str, feed_forward: MLPConfig | None):
    module = block(norm, feed_forward)
    x = X
    slots = [(module.norm_1, module.mixer), (module.norm_2, module.feed_forward)]
    for normalise, mixer in slots[: 1 if feed_forward is None else 2]:
        if norm == "pre":
            x = x + mixer(normalise(x)).y
        else:
            x = normalise(x)
            x = x + mixer(x).y
    np.testing.assert_array_equal(module(X, None).y, x)


def test_a_block_of_llama_is_its_equation():
    module = Block(
        AttentionConfig(num_heads=2),
        SwiGLUConfig(hidden_dim=12),
        8,
        norm_type="rms",
        norm_eps=0.1,
        use_bias=False,
        init=uniform_init(),
        rngs=nnx.Rngs(0),
    )
    module.norm_1.weight[...] = jnp.linspace(0.5, 1.5, 8)
    module.norm_2.weight[...] = jnp.linspace(2.0, 1.0, 8)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * weight

    x = X + module.mixer(norm(X, jnp.linspace(0.5, 1.5, 8))).y
    x = x + module.feed_forward(norm(x, jnp.linspace(2.0, 1.0, 8))).y
    assert_close(module(X, None).y, x, FORWARD)
    assert not any("bias" in str(p) for p, _ in nnx.to_flat_state(nnx.state(module)))


def test_a_block_of_one_slot_has_one_state_and_no_other_parameters():
    module = block("pre", None)
    state = module.init_state(2, max_len=5, dtype=None)
    assert len(state) == 1
    out = module(X, state)
    assert len(out.state) == 1
    assert not any("feed_forward" in str(p) for p, _ in nnx.to_flat_state(nnx.state(module)))
