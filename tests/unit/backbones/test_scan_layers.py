"""Blocks in a loop that is compiled once: the same as one block after another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.backbones.llama import llama
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.base import MixerOutput
from jaxmem.mixers.mosaic import ContextualMemoryConfig
from jaxmem.mixers.swiglu import SwiGLU
from jaxmem.training.layout import ModelParts, take_apart
from tests.helpers.compare import FORWARD, Budget, assert_close

TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 11, (3, 9)), jnp.int32)
# Documents of 4 and 3 tokens, padding before and between them.
PACKED = jnp.asarray(np.array([[0, 1, 1, 1, 0, 1, 2, 2, 2]] * 3), jnp.int32)
SIZES: dict[str, Any] = {"vocab_size": 11, "context_len": 12, "dim": 16, "depth": 2}
MODELS = {
    "mosaic": DecoderConfig(
        mixer=ContextualMemoryConfig(num_heads=2, dropout=0.2),
        feed_forward=None,
        norm="post",
        **SIZES,
    ),
    "llama": llama(AttentionConfig(num_heads=2, dropout=0.2), hidden_dim=24, **SIZES),
}
# In float64: the gradient of a decay of the mosaic is a small difference of large numbers.
OUTPUT, SLOPE = Budget(1e-12, 1e-12, 1e-12), Budget(1e-11, 1e-11, 1e-11)


def looped(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    """The same model with its blocks in a loop."""
    return dataclasses.replace(config, scan_layers=True, **changes)


def parts_of(config: DecoderConfig, dtype: Any = jnp.float32) -> ModelParts[Decoder]:
    return take_apart(lambda rngs: config.build(rngs, dtype))


def params_of(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Stacked parameters of order 1, so that every part of the model matters."""
    rng = np.random.default_rng(0)
    shapes = parts_of(config).layout.stacked_shapes
    return {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.1, shape)
        for name, shape in shapes.items()
    }


def loss_of(parts: ModelParts[Decoder]) -> Any:
    return lambda single: jnp.sum(parts.merge_single(single)(TOKENS).logits)


@pytest.mark.parametrize(("kind", "remat"), [("mosaic", True), ("llama", False)])
def test_outputs_and_gradients_are_equal(kind: str, remat: bool):
    """With packed documents, the same dropout, and activations forgotten or kept."""
    config = MODELS[kind]
    params = params_of(config)

    def run(config: DecoderConfig) -> Any:
        parts = parts_of(config, jnp.float64)

        def scored(params: Any) -> tuple[jax.Array, jax.Array]:
            rngs = nnx.Rngs(dropout=jax.random.key(5))
            logits = parts.merge(params)(TOKENS, segment_ids=PACKED, rngs=rngs).logits
            weights = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)
            return jnp.sum(weights * logits), logits

        return jax.jit(jax.grad(scored, has_aux=True))(params)

    with jax.enable_x64(True):
        expected_grads, expected = run(config)
        grads, logits = run(looped(config, remat=remat))
    assert np.std(np.asarray(expected)) > 0.05
    assert_close(logits, expected, OUTPUT)
    assert_close(grads, expected_grads, SLOPE)


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_and_checkpoints_are_equal(kind: str):
    plain, loop = parts_of(MODELS[kind]), parts_of(looped(MODELS[kind]))
    assert loop.layout == plain.layout  # names, order, shapes and groups


@pytest.mark.parametrize("kind", MODELS)
def test_calls_with_a_state_are_the_same_program(kind: str):
    """One block after another: a loop would copy all caches at each token."""

    def program(config: DecoderConfig) -> str:
        parts = parts_of(config)

        def decode(single: Any) -> Any:
            model = parts.merge_single(single)
            first = model(TOKENS[:, :5], model.init_state(3))
            return first.logits, model.step(TOKENS[:, 5], first.state)

        return str(jax.make_jaxpr(decode)(dict(parts.layout.shapes)))

    assert program(looped(MODELS[kind])) == program(MODELS[kind])


def test_the_program_does_not_grow_with_depth():
    def products(depth: int, **changes: Any) -> int:
        config = dataclasses.replace(MODELS["llama"], depth=depth, **changes)
        parts = parts_of(config)
        text = str(jax.make_jaxpr(jax.grad(loss_of(parts)))(dict(parts.layout.shapes)))
        return text.count("dot_general[")

    loop = {"scan_layers": True, "remat": True}
    assert products(2, **loop) == products(5, **loop)
    assert products(2) < products(5)


def test_a_loop_forgets_activations_if_told_to():
    """What a loop keeps for the backward pass leaves it as arrays [depth ...]."""
    hidden = "f32[2,3,9,24]"  # depth, rows, tokens, feed-forward width
    for remat in (False, True):
        parts = parts_of(looped(MODELS["llama"], remat=remat))
        text = str(jax.make_jaxpr(jax.grad(loss_of(parts)))(dict(parts.layout.shapes)))
        assert (hidden in text) == (not remat)


def test_metrics_keep_their_names(monkeypatch: pytest.MonkeyPatch):
    mix = SwiGLU.mix

    def measured(self: SwiGLU, x: jax.Array, state: Any, **options: Any) -> MixerOutput:
        return mix(self, x, state, **options)._replace(aux={"size": jnp.mean(x[..., 0])})

    monkeypatch.setattr(SwiGLU, "mix", measured)
    plain, loop = parts_of(MODELS["llama"]), parts_of(looped(MODELS["llama"]))
    params = {name: x.astype(np.float32) for name, x in params_of(MODELS["llama"]).items()}
    aux, expected = (jax.jit(lambda p, m=m: m.merge(p)(TOKENS).aux)(params) for m in (loop, plain))
    assert sorted(aux) == ["size/block_0", "size/block_1"]
    assert not np.allclose(aux["size/block_0"], aux["size/block_1"], rtol=1e-3)
    assert_close(aux, expected, FORWARD)
