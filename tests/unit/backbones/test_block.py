"""Blocks: where the norm and the residual stand, and blocks of one slot."""

from typing import Any

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

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)

RISING = jnp.asarray(np.linspace(0.5, 1.5, 8), jnp.float32)


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
    module.norm_1.weight[...] = RISING
    return module


@pytest.mark.parametrize("feed_forward", [None, MLPConfig()], ids=["one", "two"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_its_equation(norm: str, feed_forward: MLPConfig | None):
    @jax.jit
    def run(module: Block, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots, x = [(module.norm_1, module.mixer), (module.norm_2, module.feed_forward)], start
        for normalise, mixer in slots[: 1 if feed_forward is None else 2]:
            if norm == "pre":
                x = x + mixer(normalise(x)).y
            else:
                x = normalise(x)
                x = x + mixer(x).y
        return module(start, None).y, x

    np.testing.assert_array_equal(*run(block(norm, feed_forward), X))


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
    module.norm_1.weight[...] = RISING
    module.norm_2.weight[...] = RISING[::-1]

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * weight

    @jax.jit
    def run(module: Block, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x + module.mixer(norm(x, RISING)).y
        return module(x, None).y, y + module.feed_forward(norm(y, RISING[::-1])).y

    assert_close(*run(module, X), FORWARD)
    assert not any("bias" in str(p) for p, _ in nnx.to_flat_state(nnx.state(module)))


def test_a_block_of_one_slot_has_one_state_and_no_other_parameters():
    module = block("pre", None)

    def states(x: jax.Array) -> tuple[Any, Any]:
        before = module.init_state(2, max_len=5, dtype=None)
        return before, module(x, before).state

    before, after = jax.eval_shape(states, X)
    assert len(before) == 1
    assert after == before
    assert not any("feed_forward" in str(p) for p, _ in nnx.to_flat_state(nnx.state(module)))
