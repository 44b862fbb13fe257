"""The initialisation rule of Memory Mosaics v2."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.mixers.mosaic_v2 import ContextualMemoryV2Config
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.nn.init import depth_scaled_init

CUT_STD = 0.98658  # of a standard normal cut at three deviations


@pytest.mark.parametrize("block", [0, 3])
def test_deviation_falls_with_inputs_and_depth(block: int):
    init = depth_scaled_init(block)
    for rule, shape, sigma in (
        (init.weight, (50, 400), 1 / math.sqrt(2 * 50 * (block + 1))),
        (init.residual, (200, 100), 1 / math.sqrt(2 * 200 * (block + 1))),
        (init.embedding, (400, 50), 1 / math.sqrt(2 * 50)),
        (init.head, (400, 50), 1 / math.sqrt(2 * 50)),
    ):
        drawn = np.asarray(rule(jax.random.key(0), shape, np.float32))
        assert np.std(drawn) == pytest.approx(CUT_STD * sigma, rel=0.02)
        assert 2.9 * sigma < np.max(np.abs(drawn)) <= 3 * sigma


def test_every_block_has_its_own():
    model = Decoder(
        DecoderConfig(
            vocab_size=50,
            dim=32,
            depth=3,
            mixer=ContextualMemoryV2Config(),
            feed_forward=SwiGLUConfig(hidden_dim=64),
            init="depth_scaled",
        ),
        rngs=nnx.Rngs(0),
    )
    for number, block in enumerate(model.blocks):
        sigma = 1 / math.sqrt(2 * 32 * (number + 1))
        memory = block.mixer.long
        for linear in (memory.key.projection, memory.value.projection, memory.out):
            assert np.std(linear.kernel[...]) == pytest.approx(CUT_STD * sigma, rel=0.1)
        down = np.std(block.feed_forward.down.kernel[...])
        assert down == pytest.approx(CUT_STD * sigma / math.sqrt(2), rel=0.1)
    assert np.std(model.embedding.table[...]) == pytest.approx(CUT_STD / 8, rel=0.1)
