"""The presets of the depth study: at each depth the same size, data, recipe and length."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

import configs
from jaxmem.backbones.base import with_vocabulary

DEPTHS = (1, 2, 4, 8)


def size(model):
    model = with_vocabulary(model, 24, owner="tokenizer")
    built = nnx.eval_shape(lambda: model.build(nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(built)))


@pytest.mark.parametrize("depth", DEPTHS)
def test_twins_have_the_same_size_and_differ_in_the_mixers_only(depth):
    mosaic, gpt = (configs.load(f"{kind}_depth_{depth}") for kind in ("mm", "gpt"))
    assert mosaic.model.depth == gpt.model.depth == depth
    assert size(mosaic.model) == size(gpt.model) + 28 * depth  # 7 scalars per block and head
    assert (mosaic.data, mosaic.optim, mosaic.task) == (gpt.data, gpt.optim, gpt.task)
    assert dataclasses.replace(mosaic.run, name=gpt.run.name) == gpt.run
    assert all(getattr(mosaic.model, s) == getattr(gpt.model, s) for s in ("context_len", "dim"))


@pytest.mark.parametrize("kind", ["mm", "gpt"])
def test_depths_differ_in_the_depth_only(kind):
    first, *others = (configs.load(f"{kind}_depth_{depth}") for depth in DEPTHS)
    for other in others:
        memory = {"feed_forward": other.model.feed_forward, "depth": other.model.depth}
        assert dataclasses.replace(first.model, **memory) == other.model
        assert (first.data, first.optim) == (other.data, other.optim)
