"""Weights by original names: the round trip, and complaints about weights that do not fit."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.errors import CheckpointMismatch
from jaxmem.interop.memory_mosaics import GPT, MOSAIC, MOSAIC_KEY
from jaxmem.interop.names import Names, export_params, import_params
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig

SIZES = {"vocab_size": 7, "context_len": 5, "dim": 6, "depth": 2}


def mosaic(seed: int = 0, *, use_bias: bool = True, num_heads: int = 2) -> Decoder:
    config = DecoderConfig(
        **SIZES,
        mixer=ContextualMemoryConfig(num_heads=num_heads, use_bias=use_bias),
        feed_forward=PersistentMemoryConfig(
            num_heads=num_heads, memory_size=4, num_banks=2, use_bias=use_bias
        ),
        use_bias=use_bias,
    )
    return Decoder(config, rngs=nnx.Rngs(seed))


def gpt(seed: int = 0, *, use_bias: bool = True) -> Decoder:
    config = DecoderConfig(
        **SIZES,
        mixer=AttentionConfig(num_heads=2, use_bias=use_bias),
        feed_forward=MLPConfig(use_bias=use_bias),
        positions="learned",
        use_bias=use_bias,
    )
    return Decoder(config, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("make", "names"), [(mosaic, MOSAIC), (gpt, GPT)], ids=["mosaic", "gpt"])
def test_round_trip(make, names: Names, use_bias: bool):
    source, target = make(0, use_bias=use_bias), make(1, use_bias=use_bias)
    arrays = export_params(source, names)
    import_params(target, arrays, names)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (source, target)), strict=True):
        np.testing.assert_array_equal(a, b)
    again = export_params(target, names)
    assert list(again) == list(arrays)
    assert any(name.endswith(".bias") for name in arrays) is use_bias


def test_original_layouts():
    model = mosaic()
    arrays = export_params(model, MOSAIC)
    assert arrays["lm_head.weight"] is arrays["mosaic.wte.weight"]
    part = model.blocks[1].feed_forward
    prefix = "mosaic.h.1.mlp"
    assert arrays[f"{prefix}.P_k"].shape == (2, 1, 2, 4, 3)
    decay = arrays[f"{prefix}.k_featurizer.leaky_avg.leaky_key_beta"]
    np.testing.assert_array_equal(decay[0, :, 0, 0], part.key.decay[...])
    assert decay.shape == (1, 2, 1, 1)
    np.testing.assert_array_equal(arrays[f"{prefix}.c_proj.weight"].T, part.out.kernel[...])
    assert export_params(gpt(), GPT)["transformer.h.0.attn.c_attn.weight"].shape == (18, 6)


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed():
    model = mosaic()
    before = export_params(model, MOSAIC)
    arrays = {name: a + 1 for name, a in before.items()}
    del arrays["mosaic.h.1.attn.c_proj.bias"]
    arrays["mosaic.h.2.ln_1.weight"] = np.ones(6)
    arrays["mosaic.h.0.mlp.P_v"] = np.ones((1, 1, 2, 4, 3))
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    with pytest.raises(CheckpointMismatch) as raised:
        import_params(model, arrays, MOSAIC)
    message = str(raised.value)
    assert "missing: mosaic.h.1.attn.c_proj.bias;" in message
    assert "unknown: mosaic.h.2.ln_1.weight;" in message
    assert "misshapen: mosaic.h.0.mlp.P_v (1, 1, 2, 4, 3) instead of (2, 1, 2, 4, 3);" in message
    assert "tied but unequal: lm_head.weight and mosaic.wte.weight." in message
    for name, a in export_params(model, MOSAIC).items():
        np.testing.assert_array_equal(a, before[name])


def test_buffers_are_ignored_and_second_names_optional():
    model = mosaic()
    arrays = export_params(model, MOSAIC)
    del arrays["lm_head.weight"]
    arrays["mosaic.h.1.attn.bias"] = np.ones((1, 1, 5, 5))
    arrays["mosaic.h.0.mlp.k_featurizer.leaky_avg.coef"] = np.ones((5, 5))
    import_params(model, arrays, MOSAIC)


def test_buffers_of_other_parts_are_not_ignored():
    model = mosaic()
    arrays = export_params(model, MOSAIC) | {"mosaic.h.0.mlp.bias": np.ones((1, 1, 5, 5))}
    with pytest.raises(CheckpointMismatch, match=r"unknown: mosaic\.h\.0\.mlp\.bias"):
        import_params(model, arrays, MOSAIC)


def test_mapping_of_another_family():
    with pytest.raises(CheckpointMismatch, match="has no original name in this mapping"):
        export_params(gpt(), MOSAIC_KEY)
