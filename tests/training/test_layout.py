"""Stacking parameters of like layers and taking them apart again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxmem.errors import ConfigError
from jaxmem.training.layout import Layout, init_params, take_apart
from tests.helpers.tiny_run import TinyModel, tiny_batch


def abstract(**shapes):
    return {
        name.replace("_", "."): jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()
    }


def there_and_back(layout, single):
    names = []

    @jax.jit
    def convert(single):
        back = layout.unstack(layout.stack(single))
        names.extend(back)
        return back

    back = convert(single)
    assert names == list(single)
    return back


def test_layers_are_stacked_and_come_apart_in_order():
    layout = Layout(abstract(b_0_w=(2, 3), b_1_w=(2, 3), b_0_s=(), b_1_s=(), head=(3,)))
    assert layout.stacked_shapes == {"b.*.w": (2, 2, 3), "b.*.s": (2,), "head": (3,)}
    rng = np.random.default_rng(0)
    single = {name: np.float32(rng.random(leaf.shape)) for name, leaf in layout.shapes.items()}
    back = there_and_back(layout, single)
    chex.assert_trees_all_equal(back, single)


def test_layers_of_unequal_shape_share_no_array():
    layout = Layout(abstract(b_0_w=(2,), b_1_w=(3,), b_2_w=(2,), b_3_w=(3,)))
    assert sorted(map(len, layout.groups.values())) == [2, 2]
    single = {
        name: np.full(leaf.shape, i, np.float32)
        for i, (name, leaf) in enumerate(layout.shapes.items())
    }
    chex.assert_trees_all_equal(there_and_back(layout, single), single)


def test_layer_axis_is_never_sharded():
    layout = Layout(abstract(**{f"b_{i}_w": (4, 2) for i in range(8)}))
    assert layout.specs(4) == {"b.*.w": PartitionSpec(None, "fsdp")}


def test_merged_model_computes_what_the_original_does():
    parts = take_apart(TinyModel)
    key = jax.random.key(3)
    stacked = jax.jit(lambda key: init_params(TinyModel, parts, key))(key)
    assert len(stacked) == 5  # embed, two of the stacked layers, two of the head
    tokens = tiny_batch(2)["tokens"]
    want = jax.jit(lambda key: TinyModel(nnx.Rngs(params=key))(tokens).logits)(key)
    found = jax.jit(lambda stacked: parts.merge(stacked)(tokens).logits)(stacked)
    chex.assert_trees_all_close(found, want, rtol=1e-6)


def test_variables_that_training_would_lose_are_refused():
    class Counting(nnx.Module):
        def __init__(self, rngs):
            self.count = nnx.BatchStat(jnp.zeros(()))

    with pytest.raises(ConfigError, match=r"not nnx\.Param: count"):
        take_apart(Counting)
