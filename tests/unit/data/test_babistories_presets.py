"""The presets of BabiStories: sizes, twins, decay groups, and the tiny ones on a made-up file."""

import dataclasses
import functools
import json
import math
import random

import jax
import pytest
from flax import nnx

import configs
from jaxmem.backbones.base import with_vocabulary
from jaxmem.data.pipeline import load_corpus
from jaxmem.data.tokenizers import gpt2_tokenizer
from jaxmem.errors import ConfigError
from jaxmem.reports.runs import read_metrics
from jaxmem.training.optim import OptimConfig, decay_groups
from jaxmem.training.run import train


@functools.cache
def shapes(model):
    state = nnx.state(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))))
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize(
    ("name", "published"), [("mm_babistories", 123_588_336), ("gpt_babistories", 123_980_544)]
)
def test_sizes_and_decay_groups_are_the_authors(name, published):
    model = configs.load(name).model
    decayed, plain = decay_groups(shapes(model), OptimConfig())
    assert decayed.count + plain.count == published
    # Not decayed: 25 layer norms, and per head three scalars of each memory and the values' mix.
    scalars = 12 * 7 * 12 if name.startswith("mm") else 0
    assert plain.count == 25 * 768 + scalars
    assert all(len(shape) == 1 for n, shape in shapes(model).items() if n in plain.names)


@pytest.mark.parametrize("suffix", ["", "_tiny"])
def test_twins_differ_in_the_model_only(suffix):
    mosaic, gpt = (configs.load(f"{kind}_babistories{suffix}") for kind in ("mm", "gpt"))
    assert (mosaic.data, mosaic.optim) == (gpt.data, gpt.optim)
    assert dataclasses.replace(mosaic.run, name=gpt.run.name) == gpt.run
    counts = [sum(map(math.prod, shapes(preset.model).values())) for preset in (mosaic, gpt)]
    assert counts[0] == pytest.approx(counts[1], rel=0.04)


def test_the_padded_vocabulary_holds_gpt2_and_a_smaller_one_is_refused(corpus_extra):
    model = configs.load("mm_babistories").model
    size = gpt2_tokenizer().vocab_size
    assert with_vocabulary(model, size, owner="tokenizer").vocab_size == 50304
    small = dataclasses.replace(model, vocab_size=50_000)
    with pytest.raises(ConfigError, match=r"50000.*50257"):
        with_vocabulary(small, size, owner="tokenizer")


def test_tiny_preset_trains_on_a_file_of_stories(cache, tmp_path):
    """Its twin differs in the model only, one like that of mm_tiny."""
    rng = random.Random(0)
    words = ["Tim", "Sue", "had", "a", "red", "ball", '"Hi!"', "said", "and", "ran"]
    lines = [json.dumps(" ".join(rng.choices(words, k=60))) for _ in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    preset = configs.load("gpt_babistories_tiny")
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, context_len=16, dim=16, depth=1),
        data=dataclasses.replace(preset.data, path=str(path)),
        optim=dataclasses.replace(preset.optim, warmup_steps=2),
        run=dataclasses.replace(
            preset.run,
            dir=str(tmp_path / "run"),
            steps=20,
            eval_every=20,
            eval_batches=2,
            samples=0,
        ),
    )
    train(config)
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert list((cache / "tokens").glob("train-*"))


@pytest.mark.parametrize("name", ["mm_babistories", "gpt_babistories_tiny"])
def test_without_a_path_it_says_so(name):
    with pytest.raises(ConfigError, match=r"data\.source=jsonl needs a path.*--data\.path"):
        load_corpus(configs.load(name).data)
