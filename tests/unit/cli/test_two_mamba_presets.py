"""The presets of 2Mamba: published sizes, recipe, and how the models of a size differ."""

import dataclasses
import gzip
import json
import random

import numpy as np
import pytest
import tokenizers
from flax import nnx

import configs
from experiments import cli, evaluate
from jaxmem.backbones.base import with_vocabulary
from jaxmem.data.pipeline import batches, load_corpus
from jaxmem.data.shards import HoldOut
from jaxmem.errors import ConfigError, DataError
from jaxmem.interop.attention_types import from_name
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.reports.runs import read_metrics
from jaxmem.training.optim import learning_rate
from jaxmem.training.run import train
from tests.helpers.drawn import drawn
from tests.helpers.parameter_count import parameter_count

KINDS = ("softmax", "gated", "linear", "mamba2", "2mamba", "2mamba_e")
HEADS, WIDTHS = 16, {"small": 64, "large": 192}
MIXERS = {
    "softmax": lambda size: from_name("softmax", num_heads=HEADS),
    "mamba2s": lambda size: from_name("mamba2s", num_heads=HEADS),
    "2mamba": lambda size: from_name("2mamba", num_heads=HEADS),
    "2mamba_dt": lambda size: from_name("2mamba", num_heads=HEADS, value="dt"),
    "mamba": lambda size: Mamba2Config(head_dim=WIDTHS[size], ssm_dim=WIDTHS[size]),
}
PUBLISHED = {
    "small": (275.293, 276.153, 275.805, 276.133, 259.600),
    "large": (2084.171, 2086.751, 2085.707, 2086.690, 1911.243),
}
"""Millions of parameters, in the order of MIXERS."""


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_as_many_as_published(size):
    preset = configs.load(f"two_mamba_softmax_{size}").model
    for (name, mixer), published in zip(MIXERS.items(), PUBLISHED[size], strict=True):
        count = parameter_count(dataclasses.replace(preset, mixer=mixer(size)))
        assert f"{count / 1e6:.3f}" == f"{published:.3f}", name


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_models_of_a_size_differ_in_the_mixer_only(size):
    first = configs.load(f"two_mamba_softmax_{size}")
    for kind in KINDS[1:]:
        other = configs.load(f"two_mamba_{kind}_{size}")
        model = {"mixer": first.model.mixer, "context_len": first.model.context_len}
        assert dataclasses.replace(other.model, **model) == first.model
        assert dataclasses.replace(other.run, name=first.run.name) == first.run
        if kind == "gated" and size != "tiny":  # of the other paper, with its recipe
            assert (other.optim.clip_norm, other.data.batch_size) == (1.0, 36)
            assert other.model.context_len == 1024
        else:
            assert (other.data, other.optim) == (first.data, first.optim)
            assert other.model.context_len == first.model.context_len
        heads = getattr(other.model.mixer, "num_heads", None)
        assert heads == {"tiny": 4, "small": 16, "large": 16}[size] or kind == "mamba2"


def test_the_recipe_is_the_papers():
    preset = configs.load("two_mamba_2mamba_small")
    optim = preset.optim
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-7, 0.01)
    assert optim.decay_all
    assert not optim.clip_norm
    rate = learning_rate(optim, preset.run.steps)
    for step, lr in ((0, 0.0), (5_000, 5e-5), (10_000, 1e-4), (100_000, 0.90909e-4), (10**6, 0.0)):
        assert float(rate(step)) == pytest.approx(lr, rel=1e-4, abs=1e-12)
    assert (preset.run.precision, preset.data.sampling) == ("bfloat16", "documents")
    assert (preset.data.validation_share, preset.data.validation_seed) == (0.001, 123)
    assert preset.model.remat
    assert preset.model.scan_layers


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_learn_from_every_token(kind):
    preset = dataclasses.replace(configs.load(f"two_mamba_{kind}_tiny").model, depth=1)
    config = with_vocabulary(preset, 11, owner="tokenizer")
    model = drawn(lambda: config.build(nnx.Rngs(0)), spread=0.2)
    run = nnx.jit(lambda model, tokens: model(tokens).logits)
    tokens = np.arange(24).reshape(2, 12) % 11
    logits = np.asarray(run(model, tokens))
    assert logits.shape == (2, 12, 11)
    assert np.isfinite(logits).all()
    tokens[:, 6] += 1
    changed = np.asarray(run(model, tokens))
    np.testing.assert_array_equal(changed[:, :6], logits[:, :6])
    assert not np.allclose(changed[:, 6], logits[:, 6])


def test_fields_may_be_overridden():
    args = "--config two_mamba_mamba2_small --model.mixer.ssm-dim 64 --data.path x.jsonl.gz"
    config = cli.parse_run(args.split(), "train").config
    assert f"{parameter_count(config.model) / 1e6:.3f}" == "259.600"
    args = ["--config", "two_mamba_2mamba_small", "--model.mixer.value", "dt"]
    config = cli.parse_run(args, "train").config
    assert f"{parameter_count(config.model) / 1e6:.3f}" == "276.133"
    gelu = dataclasses.replace(config.model, feed_forward=MLPConfig())
    assert parameter_count(gelu) > parameter_count(config.model)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, not below the data."""
    monkeypatch.setenv("JAXMEM_CACHE", str(tmp_path.with_name(f"{tmp_path.name}_cache")))


@pytest.fixture
def llama_like(tmp_path):
    """The path of a vocabulary of bytes with tokens before and after a document."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.mark.usefixtures("cache")
def test_the_recipe_trains_on_compressed_documents(capsys, tmp_path, llama_like):
    rng = random.Random(0)
    words = ["Tim", "Sue", "had", "a", "red", "ball", '"Hi!"', "said", "and", "ran"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(120)]
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[shard::3])
        (shards / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    preset = configs.load("two_mamba_2mamba_small")
    model = dataclasses.replace(
        preset.model,
        vocab_size=258,
        context_len=32,
        dim=16,
        depth=2,
        mixer=dataclasses.replace(preset.model.mixer, num_heads=2),
        feed_forward=SwiGLUConfig(hidden_dim=32),
    )
    fields = {"path": str(shards), "tokenizer": str(llama_like), "validation_share": 0.1}
    run = {"steps": 30, "eval_every": 30, "eval_batches": 2, "samples": 0}
    config = dataclasses.replace(
        preset,
        model=model,
        data=dataclasses.replace(preset.data, batch_size=8, **fields),
        optim=dataclasses.replace(preset.optim, lr=1e-2, warmup_steps=2, decay_steps=0),
        run=dataclasses.replace(preset.run, dir=str(tmp_path / "run"), checkpoint_every=30, **run),
    )
    corpus = load_corpus(config.data)
    assert len(corpus.documents("validation")) == sum(map(HoldOut(0.1, 123).takes, texts))
    batch = next(
        batches(
            corpus,
            "train",
            context_len=32,
            batch_size=8,
            sampling="documents",
            seed=0,
            begin_of_text=True,
        )
    )
    assert (batch["tokens"][:, 0] == corpus.tokenizer.begin_of_text).all()
    assert (batch["targets"] == corpus.tokenizer.end_of_text).any()
    train(config)
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.5

    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path / "run")]) == 0
    count = len(corpus.documents("validation"))
    assert f" tokens in {count} documents of at most 32" in capsys.readouterr().out


def test_without_a_text_or_a_vocabulary_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = configs.load("two_mamba_softmax_small").data
    with pytest.raises(ConfigError, match=r"source=jsonl needs a path.*--data\.path"):
        load_corpus(data)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"no tokenizer file tokenizer\.json"):
        load_corpus(dataclasses.replace(data, path="a.jsonl"))
