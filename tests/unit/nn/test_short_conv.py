"""The short convolution: its equation, its history, documents and padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError
from jaxmem.nn.short_conv import ShortConv
from tests.helpers.compare import FORWARD, assert_close

X = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
CONV = jax.jit(lambda layer, x, *history, **ids: layer(x, *history, **ids))
# Documents of 3 and 2 tokens, padding before, within and after them.
PACKED = np.array([0, 1, 1, 0, 1, 2, 2])


def convolved(x: Any, layer: ShortConv) -> np.ndarray:
    """The equation, tap by tap; `np.convolve` has the newest tap first."""
    kernel, length = np.asarray(layer.kernel[...]), x.shape[1]
    y = np.stack(
        [
            [np.convolve(row[:, c], kernel[::-1, c])[:length] for c in range(x.shape[2])]
            for row in np.asarray(x)
        ]
    ).transpose(0, 2, 1)
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_its_equation(width: int, use_bias: bool):
    layer = ShortConv(3, width, use_bias=use_bias, rngs=nnx.Rngs(0))
    y, history = CONV(layer, X)
    assert_close(y, convolved(X, layer).astype(np.float32), FORWARD)
    np.testing.assert_array_equal(history, X[:, 7 - (width - 1) :])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_row_in_pieces_is_the_row(packed: bool):
    layer = ShortConv(3, 4, rngs=nnx.Rngs(0))
    ids = np.broadcast_to(PACKED, X.shape[:2]) if packed else None
    cut = lambda part: None if ids is None else ids[:, part]  # noqa: E731
    whole, end = CONV(layer, X, segment_ids=ids)
    history = layer.init_history(2, X.dtype)
    pieces = []
    segment = np.ones(2, np.int32) if packed else None
    for part in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 7)):
        y, history = CONV(
            layer, X[:, part], history, segment_ids=cut(part), initial_segment=segment
        )
        pieces.append(y)
    real = np.flatnonzero(PACKED) if packed else slice(None)
    assert_close(np.concatenate(pieces, axis=1)[:, real], np.asarray(whole)[:, real], FORWARD)
    np.testing.assert_array_equal(history, end)


def test_documents_and_padding():
    layer = ShortConv(3, 3, rngs=nnx.Rngs(0))
    y = np.asarray(CONV(layer, X, segment_ids=np.broadcast_to(PACKED, X.shape[:2]))[0])
    assert np.all(np.isfinite(y))
    for number in (1, 2):
        here = np.flatnonzero(number == PACKED)
        assert_close(y[:, here], convolved(X[:, here], layer).astype(np.float32), FORWARD)


def test_half_precision_is_summed_in_float32():
    layer = ShortConv(3, 4, rngs=nnx.Rngs(0))
    x = X.astype(jnp.bfloat16)
    y, history = CONV(layer, x)
    assert (y.dtype, history.dtype) == (jnp.bfloat16, jnp.bfloat16)
    wide, _ = CONV(layer, x.astype(np.float32))
    np.testing.assert_array_equal(y, np.asarray(wide).astype(jnp.bfloat16))


def test_it_starts_uniform():
    layer = ShortConv(4000, 4, rngs=nnx.Rngs(0))
    for leaf in (layer.kernel, layer.bias):
        values = np.asarray(leaf[...])
        assert 0.49 < np.max(values) < 0.5
        assert -0.5 < np.min(values) < -0.49
        assert np.std(values) == pytest.approx(0.5 / np.sqrt(3), rel=0.03)


def test_it_needs_a_tap():
    with pytest.raises(ConfigError, match=r"width 0 has no taps\. Use 1"):
        ShortConv(3, 0, rngs=nnx.Rngs(0))
