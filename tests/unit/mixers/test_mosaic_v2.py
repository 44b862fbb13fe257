"""Memory Mosaics v2 against its equations, and what the laws do not say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import build
from jaxmem.mixers.mosaic_v2 import ContextualMemoryV2, ContextualMemoryV2Config
from jaxmem.mixers.swiglu import SwiGLU, SwiGLUConfig
from jaxmem.nn.init import gpt2_init
from tests.helpers.compare import FORWARD, assert_close

DIM, HEADS, LENGTH = 8, 2, 12
CONFIG = ContextualMemoryV2Config(num_heads=HEADS, window=4, min_lag=2, max_lag=5, chunk_size=5)


def make(config: ContextualMemoryV2Config = CONFIG) -> ContextualMemoryV2:
    """Build the mixer with weights and scalars away from their start."""
    mixer = build(config, DIM, init=gpt2_init(1, 0.5), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    draw = np.random.default_rng(1)

    def moved(p: jax.Array) -> jax.Array:
        return jnp.asarray(p + 0.2 * draw.normal(size=p.shape), jnp.float32)

    return nnx.merge(graph, jax.tree.map(moved, params))


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, LENGTH, DIM)), jnp.float32)


@pytest.fixture(scope="module")
def mixer() -> ContextualMemoryV2:
    return make()


def unit(a: np.ndarray) -> np.ndarray:
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def by_the_equations(mixer: ContextualMemoryV2, x: np.ndarray, lag: int) -> np.ndarray:
    """Run one document, pair by pair, in float64."""

    def value(parameter: nnx.Param) -> np.ndarray:
        return np.asarray(parameter[...], np.float64)

    y = np.zeros_like(x)
    for memory, reads in (
        (mixer.short, lambda t: range(max(t - CONFIG.window, 0), t)),
        (mixer.long, lambda t: range(t - lag + 1)),
    ):
        wide = x @ value(memory.key.projection.kernel)
        gate = np.exp(x @ value(memory.key.gate.kernel))
        decay = np.exp(-np.abs(x @ value(memory.key.decay.kernel)))
        u = x @ value(memory.value.projection.kernel)
        for head in range(HEADS):
            part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            total, keys = 0.0, []
            for t in range(len(x)):
                total = decay[t, head] * total + gate[t, head] * wide[t, part]
                keys.append(unit(total))
            mix = value(memory.value.mix)[head]
            mixed = mix * u[:-1, part] + (1 - mix) * u[1:, part]
            values = np.exp(min(abs(value(memory.value.scale)[head]), 15)) * unit(mixed)
            slope, offset = (
                np.exp(min(value(b)[head], 10))
                for b in (memory.bandwidth.slope, memory.bandwidth.offset)
            )
            exponent = min(abs(value(memory.bandwidth.exponent)[head]), 1)
            for t in range(len(x)):
                pairs = list(reads(t))
                if not pairs:
                    continue
                beta = slope * len(pairs) ** exponent + offset
                weights = np.exp([beta * (keys[t] @ keys[i] - 1) for i in pairs])
                read = weights @ values[pairs] / weights.sum()
                y[t] += read @ value(memory.out.kernel)[part]
    return y


def rows_by_the_equations(mixer: ContextualMemoryV2, x: jax.Array, lag: int) -> np.ndarray:
    return np.stack([by_the_equations(mixer, np.asarray(row, np.float64), lag) for row in x])


def test_equals_its_equations(mixer: ContextualMemoryV2, x: jax.Array):
    """Outside of training memories have the least age."""
    y = jax.jit(lambda x: mixer(x).y)(x)
    assert_close(y, rows_by_the_equations(mixer, x, lag=CONFIG.min_lag), FORWARD)


def test_age_is_drawn_in_training_and_once_per_call(mixer: ContextualMemoryV2, x: jax.Array):
    by_age = {lag: rows_by_the_equations(mixer, x, lag) for lag in range(2, 6)}
    other = make()

    @jax.jit
    def run(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        second = nnx.Rngs(dropout=key)
        second.dropout()
        chunked = mixer(x, rngs=nnx.Rngs(dropout=key), form="chunked").y
        return mixer(x, rngs=nnx.Rngs(dropout=key)).y, other(x, rngs=second).y, chunked

    drawn = set()
    for seed in range(16):
        y, of_other, chunked = jax.device_get(run(jax.random.key(seed)))
        close = {lag for lag, wanted in by_age.items() if np.allclose(y, wanted, atol=1e-5)}
        assert len(close) == 1
        drawn |= close
        # Another layer of the same call draws the same, and so does every chunk.
        np.testing.assert_array_equal(of_other, y)
        assert_close(chunked, y, FORWARD)
    assert drawn == set(by_age)


def test_short_term_state_does_not_grow(mixer: ContextualMemoryV2):
    state = jax.eval_shape(lambda: mixer.init_state(1, max_len=1000))
    assert state.short.pairs.keys.shape[1] == CONFIG.window
    assert state.long.pairs.keys.shape[1] == 1000
    growth = mixer.state_bytes(1, 1001) - mixer.state_bytes(1, 1000)
    assert growth == 4 * (2 * DIM + 1)  # a key, a value and a document of the long-term memory


def test_scale_of_values_moves_from_its_start(x: jax.Array):
    mixer = build(CONFIG, DIM, init=gpt2_init(1, 0.5), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x).y ** 2)))(params)
    for memory in (grads.short, grads.long):
        assert np.min(np.abs(memory.value.scale[...])) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "does not divide"),
        ({"min_lag": 0}, "cannot read its own pair"),
        ({"min_lag": 9, "max_lag": 8, "window": 16}, r"1 <= min_lag <= max_lag"),
        ({"window": 3, "max_lag": 5}, "window=3 ends before max_lag=5"),
    ],
)
def test_senseless_configs_are_refused(fields: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields).check(DIM, "model.mixer")


def test_swiglu_equals_its_equation(x: jax.Array):
    layer = SwiGLU(SwiGLUConfig(hidden_dim=6), DIM, init=gpt2_init(1, 0.5), rngs=nnx.Rngs(0))
    gate, up, down = (
        np.asarray(p.kernel[...], np.float64) for p in (layer.gate, layer.up, layer.down)
    )
    wide = np.asarray(x, np.float64)
    hidden = wide @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (wide @ up)) @ down
    assert_close(jax.jit(lambda x: layer(x).y)(x), expected, FORWARD)
    with pytest.raises(ConfigError, match=r"hidden_dim=0 is not positive\. Use 24"):
        SwiGLUConfig(hidden_dim=0).check(DIM, "model.feed_forward")
