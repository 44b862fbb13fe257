"""What every mixer refuses."""

import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx

from jaxmem.errors import DTypeError, ShapeError
from jaxmem.mixers.base import build, config_class
from jaxmem.nn.init import gpt2_init


@pytest.fixture
def mixer(monkeypatch: pytest.MonkeyPatch):
    # Let bad arguments reach the mixer, as they do without the type checks of the tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return build(config_class("mha")(), 32, init=gpt2_init(1), rngs=nnx.Rngs(0))


def test_activations_are_floating_point(mixer):
    with pytest.raises(DTypeError, match=r"Attention: x is int32.*Cast it to float32 or bfloat16"):
        mixer(jnp.ones((2, 3, 32), jnp.int32))


@pytest.mark.parametrize("shape", [(2, 3, 31), (3, 32)])
def test_activations_have_the_width_of_the_mixer(mixer, shape):
    with pytest.raises(ShapeError, match=r"Attention expects activations \[B T 32\], found \("):
        mixer(jnp.ones(shape))
