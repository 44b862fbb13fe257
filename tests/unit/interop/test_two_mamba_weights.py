"""Weight files of 2Mamba by the original names: there, back, and whose they are."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import configs
from jaxmem.backbones.decoder import Decoder
from jaxmem.errors import CheckpointMismatch, ConfigError
from jaxmem.interop.attention_types import ATTENTION, FIXED, MAMBA, UNLISTED, from_name
from jaxmem.interop.families import FAMILIES
from jaxmem.interop.weights import load_weights, save_weights
from jaxmem.mixers.mlp import MLPConfig

FAMILY = {
    "softmax": "two_mamba",
    "gated": "two_mamba_attention",
    "linear": "two_mamba",
    "mamba2": "two_mamba_mamba2",
    "2mamba": "two_mamba",
    "2mamba_e": "two_mamba",
}
SIZES = {"vocab_size": 11, "dim": 16, "context_len": 8}
SHAPES = {
    "softmax": {"qkv_proj.weight": (48, 16), "o_proj.weight": (16, 16)},
    "gated": {
        **{f"{name}_proj.weight": (16, 16) for name in "qkvo"},
        **{f"{side}_gate_proj.weight": (4, 16) for side in ("in", "out")},
        **{f"{side}_gate_proj.bias": (4,) for side in ("in", "out")},
        "out_norm.weight": (4,),
        "out_norm.bias": (4,),
    },
    "linear": {
        "qkv_proj.weight": (48, 16),
        "o_proj.weight": (16, 16),
        "out_norm.weight": (16,),
    },
    "mamba2": {
        # Twice no MLP, z, then x with B and C of width 32, then dt of 4 heads.
        "mamba_layer.in_proj.weight": (16 + 16 + 64 + 4, 16),
        "mamba_layer.conv1d.weight": (16 + 64, 1, 2),
        "mamba_layer.dt_bias": (4,),
        "mamba_layer.A_log": (4,),
        "mamba_layer.D": (16,),
        "mamba_layer.norm.weight": (16,),
        "mamba_layer.out_proj.weight": (16, 16),
    },
    "2mamba": {
        "qkv_proj.weight": (48, 16),
        "conv1d.weight": (48, 1, 2),
        "conv1d.bias": (48,),
        "A_mask_proj.weight": (4, 16),
        "o_proj.weight": (16, 16),
    },
}
SHAPES["2mamba_e"] = SHAPES["2mamba"]


def model_of(kind, seed=0):
    config = configs.load(f"two_mamba_{kind}_tiny").model
    mixer = {"head_dim": 4} if kind == "mamba2" else {}
    mixer = dataclasses.replace(config.mixer, **mixer)
    return Decoder(dataclasses.replace(config, **SIZES, mixer=mixer), rngs=nnx.Rngs(seed))


def upstream(kind):
    """Make a checkpoint by the original names and shapes, with its buffers."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (11, 16), "lm_head.weight": (11, 16)}
    shapes["model.norm.weight"] = (16,)
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}": s for name, s in SHAPES[kind].items()}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (128, 16) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (16, 128)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (16,)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


@pytest.mark.parametrize("kind", FAMILY)
def test_a_file_by_the_original_names_comes_in_and_goes_out_equal(kind, tmp_path):
    arrays = upstream(kind)
    buffers = {}
    if FAMILY[kind] == "two_mamba":
        buffers["model.layers.1.self_attn.attn_mask"] = np.ones((1, 1, 8, 8), bool)
    save_file(arrays | buffers, tmp_path / "in.safetensors")
    model = model_of(kind)
    assert load_weights(model, tmp_path / "in.safetensors") == FAMILY[kind]
    attention = arrays["model.layers.1.self_attn.o_proj.weight"] if kind != "mamba2" else None
    if attention is not None:
        np.testing.assert_array_equal(model.blocks[1].mixer.out.kernel[...], attention.T)
    assert save_weights(model, tmp_path / "out.safetensors") == FAMILY[kind]
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("kind", ["gated", "mamba2", "2mamba"])
def test_our_weights_come_back(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    source, target = model_of(kind), model_of(kind, 1)
    save_weights(source, path)
    load_weights(target, path)
    assert not np.array_equal(model_of(kind, 1).head.table[...], source.head.table[...])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(target), nnx.state(source))
    marked = [
        family
        for family, (_, mark, *_) in FAMILIES.items()
        if any(re.fullmatch(mark, tensor) for tensor in load_file(path))
    ]
    assert marked == [FAMILY[kind]]


@pytest.mark.parametrize("name", ["gated_softmax_decay", "softmax_learned_terms", "linear_cosine"])
def test_attention_types_with_parameters_of_their_own(name, tmp_path):
    config = dataclasses.replace(
        configs.load("two_mamba_gated_tiny").model,
        **SIZES,
        mixer=from_name(name, "attention", num_heads=4),
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert save_weights(model, tmp_path / "w.safetensors") == "two_mamba_attention"
    assert load_weights(model, tmp_path / "w.safetensors") == "two_mamba_attention"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layer"}, "model.norm_type is 'layer' instead of 'rms'"),
        ({"norm_eps": 1e-6}, "model.norm_eps is 1e-06 instead of 1e-05"),
        ({"feed_forward": MLPConfig()}, "model.feed_forward is mlp instead of swiglu"),
    ],
    ids=["norm", "eps", "mlp"],
)
def test_models_that_compute_something_else(changes, words, tmp_path):
    model = model_of("2mamba")
    save_weights(model, tmp_path / "w.safetensors")
    other = Decoder(dataclasses.replace(model.config, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointMismatch, match=re.escape(words)):
        load_weights(other, tmp_path / "w.safetensors")


MAMBA_CHANGES = {
    "rope_theta": (500.0, "model.mixer.rope_theta is 500.0 instead of 10000.0"),
    "clamp": (5.0, "model.mixer.clamp is 5.0 instead of None"),
    "scale_products": (False, "model.mixer.scale_products is False instead of True"),
    "feature": ("elu1", "model.mixer.feature is 'elu1' instead of 'id' or 'relu' or 'silu'"),
    "decay": ("lagged", "model.mixer.decay is 'lagged' instead of 'none' or 'discretize'"),
    "floor": (1.0, "model.mixer.floor is 1.0 instead of 0.0"),
    "eps": (1e-4, "model.mixer.eps is 0.0001 instead of 0.0"),
    "detach": (True, "model.mixer.detach is True instead of False"),
    "norm_eps": (1e-5, "model.mixer.norm_eps is 1e-05 instead of 1.19"),
    "denominator": ("count", "model.mixer.denominator is 'count' instead of 'sum'"),
    "norm": ("rms_all", "instead of"),
}
ATTENTION_CHANGES = {
    "rope_theta": (500.0, "model.mixer.rope_theta is 500.0 instead of 10000.0"),
    "rope_positions": ("bfloat16", "model.mixer.rope_positions is 'bfloat16' instead of 'float32'"),
    "norm_eps": (1e-6, "model.mixer.norm_eps is 1e-06 instead of 1e-05"),
    "clamp": (4.0, "model.mixer.clamp is 4.0 instead of 5.0"),
    "decay": ("neg_softplus", "model.mixer.decay is 'neg_softplus' instead of 'none'"),
    "out_gate": ("post", "model.mixer.out_gate is 'post' instead of"),
    "conv": (2, "model.mixer.conv is 2 instead of 0"),
}


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        *(("2mamba", field, *change) for field, change in MAMBA_CHANGES.items()),
        *(("gated", field, *change) for field, change in ATTENTION_CHANGES.items()),
        ("mamba2", "norm_eps", 1e-6, "model.mixer.norm_eps is 1e-06 instead of 1e-05"),
    ],
)
def test_layers_that_the_original_does_not_compute(kind, field, value, words, tmp_path):
    config = model_of(kind).config
    mixer = dataclasses.replace(config.mixer, **{field: value})
    model = Decoder(dataclasses.replace(config, mixer=mixer), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=re.escape(words)):
        save_weights(model, tmp_path / "w.safetensors", names=FAMILY[kind])
    assert save_weights(model, tmp_path / "w.safetensors") == "jaxmem"


def test_every_published_type_is_of_its_family():
    def families(mixer):
        config = dataclasses.replace(configs.load("two_mamba_gated_tiny").model, mixer=mixer)
        return [name for name, family in FAMILIES.items() if not family.differences(config)]

    for name in MAMBA:
        assert families(from_name(name, num_heads=2)) == ["two_mamba"], name
    for name in ATTENTION | UNLISTED:
        # That one has the second paper's projections, and names of its own.
        found = [] if name == "poly_learned_coefficients" else ["two_mamba_attention"]
        assert families(from_name(name, "attention", num_heads=2)) == found, name
    for name in FIXED:
        assert not families(from_name(name, "attention", fixed=True, num_heads=2)), name
    assert families(from_name("mamba", head_dim=16)) == ["two_mamba_mamba2"]
    rounded = from_name("softmax", num_heads=2, rope_positions="bfloat16")
    assert families(rounded) == ["two_mamba"]
    short = from_name("softmax_taylor_80terms", "attention", num_heads=2, terms=3)
    assert not families(short)
    assert families(from_name("softmax_learned_terms", "attention", terms=3)) == [
        "two_mamba_attention"
    ]


def test_the_two_papers_names_do_not_mix(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.mixer\.rope is 'half' instead of"):
        save_weights(model_of("gated"), tmp_path / "w.safetensors", names="two_mamba")
    with pytest.raises(ConfigError, match=r"model\.mixer is mamba2 instead of two_mamba"):
        save_weights(model_of("mamba2"), tmp_path / "w.safetensors", names="two_mamba")


@pytest.mark.parametrize("name", ["mm_tiny", "gpt_tiny"])
def test_models_with_other_norms_are_of_no_older_family(name):
    config = dataclasses.replace(configs.load(name).model, vocab_size=11)
    fitting = [family for family, f in FAMILIES.items() if not f.differences(config)]
    assert len(fitting) >= 1
    other = dataclasses.replace(config, norm_type="rms")
    assert not [family for family, f in FAMILIES.items() if not f.differences(other)]
