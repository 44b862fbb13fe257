"""Weight files: whose names they have, the way there and back, and what is wrong with others."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.errors import CheckpointMismatch, ConfigError, UnknownName
from jaxmem.interop.families import FAMILIES
from jaxmem.interop.names import params_of
from jaxmem.interop.weights import load_weights, save_weights
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig

SIZES = {"vocab_size": 7, "context_len": 5, "dim": 6, "depth": 2}
LIBRARY = {"num_heads": 2, "scale_limit": LIBRARY_LIMIT}
CONFIGS = {
    "nano_mosaic": DecoderConfig(
        **SIZES,
        mixer=ContextualMemoryConfig(num_heads=2),
        feed_forward=PersistentMemoryConfig(num_heads=2, memory_size=4),
    ),
    "library": DecoderConfig(
        **SIZES,
        mixer=ContextualMemoryConfig(**LIBRARY),
        feed_forward=PersistentMemoryConfig(**LIBRARY, memory_size=4, num_banks=2),
        scale_logits=True,
    ),
    "gpt": DecoderConfig(
        **SIZES,
        mixer=AttentionConfig(num_heads=2),
        feed_forward=MLPConfig(),
        positions="learned",
    ),
}
CONVOLUTIONS = dataclasses.replace(
    CONFIGS["library"],
    mixer=ContextualMemoryConfig(
        **LIBRARY, key_kernel_size=2, value_extractor="conv", value_kernel_size=3, use_bias=True
    ),
    feed_forward=None,
    norm="post",
    tie_embedding=False,
)


def build(config: DecoderConfig, seed: int = 0) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(seed))


def values(model: Decoder) -> dict[str, np.ndarray]:
    return {path: np.asarray(param[...]) for path, param in params_of(model).items()}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        *((config, name) for name, config in CONFIGS.items()),
        (CONVOLUTIONS, "library"),
        (CONFIGS["library"], "library_eft"),
        (CONFIGS["gpt"], "jaxmem"),
    ],
    ids=["nano", "library", "gpt", "convolutions", "eft", "own"],
)
def test_there_and_back(config: DecoderConfig, names: str, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    source, target = build(config, 0), build(config, 1)
    auto = names not in ("library_eft", "jaxmem")
    assert save_weights(source, path, names="auto" if auto else names) == names
    assert load_weights(target, path) == names
    for name, value in values(source).items():
        np.testing.assert_array_equal(values(target)[name], value, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(target), nnx.state(source))  # all
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_variant_eft_has_second_names(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(build(CONFIGS["library"]), path, names="library_eft")
    arrays = load_file(path)
    for place in ("blocks.0.attn", "blocks.1.pmem"):
        first, second = (arrays[f"{place}.leaky_average.leaky_beta_{c}_under"] for c in "wu")
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(arrays["head.weight"], arrays["emb.weight"])
    assert arrays["blocks.1.pmem.pmem.M_k1"].shape == (1, 2, 4, 3)


def test_layout_of_convolutions(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    model = build(CONVOLUTIONS)
    save_weights(model, path)
    weight = load_file(path)["blocks.0.attn.v_featurizer.conv.weight"]
    assert weight.shape == (6, 6, 3)
    kernel = model.blocks[0].mixer.value.projection.kernel[...]
    for j in range(3):
        np.testing.assert_array_equal(weight[:, :, j].T, kernel[6 * j : 6 * (j + 1)])


def test_a_model_of_no_family_gets_our_names(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    config = dataclasses.replace(CONFIGS["nano_mosaic"], scale_logits=True)
    assert save_weights(build(config), path) == "jaxmem"
    assert "blocks.1.mixer.key.projection.kernel" in load_file(path)


def test_half_precision_is_cast(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    model = build(CONFIGS["gpt"])
    save_weights(model, path)
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in load_file(path).items()}, path)
    load_weights(model, path)
    assert {value.dtype.name for value in values(model).values()} == {"float32"}


Edit = Callable[[dict[str, np.ndarray]], Any]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: a.pop("ln_out.weight"), "missing: ln_out.weight"),
        (lambda a: a.update({"blocks.0.attn.x": np.ones(1)}), "unknown: blocks.0.attn.x"),
        (
            lambda a: a.update({"blocks.1.attn.kernel_beta": np.ones(3)}),
            r"misshapen: blocks.1.attn.kernel_beta \(3,\) instead of \(2,\)",
        ),
        (
            lambda a: a.update({"head.weight": a["head.weight"] + 1}),
            "tied but unequal: head.weight and emb.weight",
        ),
        (
            lambda a: a.update({"ln_out.weight": np.ones(6, np.int8)}),
            r"not floating point: ln_out.weight \(int8\)",
        ),
        (
            lambda a: [a[name].fill(np.nan) for name in ("head.weight", "emb.weight")],
            "not finite: emb.weight",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "untied", "integer", "nan"],
)
def test_what_does_not_fit_is_named_and_nothing_changed(edit: Edit, words: str, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    model = build(CONFIGS["library"])
    save_weights(model, path)
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)
    other = build(CONFIGS["library"], 1)
    before = values(other)
    with pytest.raises(CheckpointMismatch, match=f"w.safetensors .names of library.: .*{words}"):
        load_weights(other, path)
    for name, value in values(other).items():
        np.testing.assert_array_equal(value, before[name])


def test_names_are_listed_up_to_a_limit(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(build(CONFIGS["library"]), path)
    deeper = dataclasses.replace(CONFIGS["library"], depth=3)
    with pytest.raises(CheckpointMismatch, match=r"missing: blocks\.2.* and \d+ more") as raised:
        load_weights(build(deeper), path)
    assert str(raised.value).count("blocks.2") == 8


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt", "model.mixer is mha instead of contextual_memory"),
        ("nano_mosaic", r"model\.mixer\.scale_limit is 22.* instead of 10\.0"),
    ],
)
def test_weights_of_a_model_that_computes_something_else(model: str, words: str, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(build(CONFIGS["library"]), path)
    with pytest.raises(CheckpointMismatch, match=words):
        load_weights(build(CONFIGS[model]), path)


def test_files_of_nobody(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    model = build(CONFIGS["gpt"])
    with pytest.raises(CheckpointMismatch, match="There is no file"):
        load_weights(model, path)
    path.write_bytes(b"PK\x03\x04 a checkpoint of PyTorch")
    with pytest.raises(CheckpointMismatch, match="no safetensors file, or damaged"):
        load_weights(model, path)
    save_file({"encoder.weight": np.ones(3)}, path)
    with pytest.raises(CheckpointMismatch, match=r"encoder\.weight.*no known family.*library_eft"):
        load_weights(model, path)


def test_names_to_write_must_exist_and_fit(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UnknownName, match="Did you mean library"):
        save_weights(build(CONFIGS["library"]), path, names="libary")
    with pytest.raises(ConfigError, match=r"model\.mixer is mha instead of contextual_memory"):
        save_weights(build(CONFIGS["gpt"]), path, names="library")
    with pytest.raises(ConfigError, match=r"model\.feed_forward is None instead of mlp"):
        save_weights(
            build(dataclasses.replace(CONFIGS["gpt"], feed_forward=None)), path, names="gpt"
        )
    assert not list(tmp_path.iterdir())


def test_each_mark_is_of_one_family_alone(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    for name, config in (*CONFIGS.items(), ("library_eft", CONFIGS["library"])):
        save_weights(build(config), path, names=name)
        marked = [
            family
            for family, (_, mark, *_) in FAMILIES.items()
            if any(re.fullmatch(mark, tensor) for tensor in load_file(path))
        ]
        assert marked == [name]
