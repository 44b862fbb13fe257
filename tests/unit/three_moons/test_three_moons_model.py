"""The memory of three moons: its laws, its options, its generations, and what it refuses."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.three_moons import (
    Projection,
    ThreeMoons,
    ThreeMoonsConfig,
    continue_series,
    project_complex,
)
from jaxmem.errors import ConfigError, ShapeError
from tests.helpers.compare import FORWARD, Budget, assert_close
from tests.helpers.drawn import drawn

LENGTH = 11
CASES = {
    "three_heads": ThreeMoonsConfig(),
    "everything": ThreeMoonsConfig(
        num_heads=2,
        head_dim=4,
        use_embedding=True,
        normalise_keys=True,
        normalise_values=True,
        learn_key_scale=True,
        attention_scale=3.0,
        value_shift=2,
        value_ban=2,
    ),
    "sum_no_shift": ThreeMoonsConfig(
        num_heads=2, head_dim=6, output="sum", value_shift=0, attention_scale=2.0
    ),
    "heads_side_by_side": ThreeMoonsConfig(output="concat"),
    "real": ThreeMoonsConfig(num_heads=1, head_dim=3, complex_linear=False, value_ban=1),
}
# An attention scale of 50 magnifies the rounding of a key. Largest error measured: 4e-6.
GENERATED = Budget(rtol=1e-4, atol=2e-5, rms=1e-5)


def build(config: ThreeMoonsConfig, *, spread: float = 0.2) -> ThreeMoons:
    return drawn(lambda: ThreeMoons(config, rngs=nnx.Rngs(0)), spread=spread)


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> ThreeMoons:
    return build(CASES[request.param])


def series(rows: int = 2, steps: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.float32(0.7 * np.random.default_rng(seed).normal(size=(rows, steps, 6)))


class Whole(NamedTuple):
    """What a memory makes of a series at once."""

    y: np.ndarray
    key: np.ndarray
    value: np.ndarray
    weights: np.ndarray
    mixed: np.ndarray
    """The values as the weights mix them."""


@nnx.jit
def compute(model: ThreeMoons, x: jax.Array) -> Whole:
    key, value = model.pairs(x)
    weights = model.attention_weights(x)
    mixed = model._mix(jnp.einsum("bhts,bshv->bthv", weights, value))
    return Whole(model(x), key, value, weights, mixed)


def whole(model: ThreeMoons, x: np.ndarray) -> Whole:
    return Whole(*map(np.asarray, compute(model, x)))


def changed_at(x: np.ndarray, step: int) -> np.ndarray:
    other = x.copy()
    other[:, step] += 1.0
    return other


def test_pieces_and_steps_equal_the_whole(model: ThreeMoons):
    x = series()

    @jax.jit
    def pieces(x: jax.Array) -> jax.Array:
        state = model.init_state(2, max_len=LENGTH)
        outputs = []
        for start, end in ((0, 1), (1, 7), (7, 10)):
            y, state = model.extend(x[:, start:end], state)
            outputs.append(y)
        y, state = model.step(x[:, -1], state)
        return jnp.concatenate([*outputs, y[:, None]], axis=1)

    assert_close(np.asarray(pieces(x)), whole(model, x).y)


def test_outputs_see_no_later_step_and_nothing_is_read_before_the_lag(model: ThreeMoons):
    x, at = series(), 7
    y, changed = whole(model, x).y, whole(model, changed_at(x, at)).y
    np.testing.assert_array_equal(changed[:, :at], y[:, :at])
    assert np.all(np.any(changed[:, at] != y[:, at], axis=-1))
    lag = model.config.value_shift + model.config.value_ban
    np.testing.assert_array_equal(y[:, :lag], 0.0)
    assert np.all(np.any(y[:, lag:] != 0.0, axis=-1))


def test_values_are_what_came_later(model: ThreeMoons):
    x, shift = series(), model.config.value_shift
    found, other = whole(model, x), whole(model, changed_at(x, 5))
    moved = np.any(other.value != found.value, axis=(0, 2, 3))
    assert list(np.flatnonzero(moved)) == [5 - shift]
    assert list(np.flatnonzero(np.any(other.key != found.key, axis=(0, 2, 3)))) == [5]
    np.testing.assert_array_equal(found.value[:, LENGTH - shift :], 0.0)


def test_attention_weights_are_those_that_give_the_output(model: ThreeMoons):
    found = whole(model, series())
    total = found.weights.sum(-1)
    lag = model.config.lag
    np.testing.assert_allclose(total[..., lag:], 1.0, atol=1e-6)
    np.testing.assert_array_equal(total[..., :lag], 0.0)
    assert np.all(found.weights[..., ~np.tri(LENGTH, k=-lag, dtype=bool)] == 0.0)
    assert_close(found.mixed, found.y, FORWARD)


def test_both_corrected_generations_agree(model: ThreeMoons):
    x = series()

    @jax.jit
    def both(x: jax.Array) -> list[jax.Array]:
        return [continue_series(model, x, 5, method=name) for name in ("cached", "recompute")]

    cached, recomputed = both(x[:, :6])
    assert cached.shape == (2, 5, 6)
    assert_close(cached, recomputed, GENERATED)
    np.testing.assert_allclose(cached[:, 0], whole(model, x).y[:, 5], atol=1e-5)


def test_released_generation_starts_one_step_late_and_stores_nothing():
    model = build(ThreeMoonsConfig(attention_scale=2.0), spread=0.3)

    @jax.jit
    def released(x: jax.Array) -> tuple[jax.Array, ...]:
        y, state = model.extend(x, model.init_state(2, max_len=10))
        fed, after = model.released_step(y[:, -1], state)
        generated = continue_series(model, x, 4, method="released")
        return generated, fed, after.arrived, continue_series(model, x, 5)

    generated, fed, arrived, corrected = released(series(steps=6))
    np.testing.assert_allclose(generated[:, 0], fed, atol=1e-6)
    np.testing.assert_array_equal(arrived[:, 6:], 0.0)
    # Both stand two steps behind the prompt; the released one lacks the value that came last.
    assert np.abs(generated[:, 0] - corrected[:, 1]).max() > 1e-3


def test_one_step_is_enough_and_none_is_refused():
    model = build(ThreeMoonsConfig())
    both = jax.jit(lambda x: (model(x), continue_series(model, x, 1)))
    for y in both(series(steps=1)):
        np.testing.assert_array_equal(y, 0.0)
    with pytest.raises(ShapeError, match=r"one step or more, found \(2, 0, 6\)"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((2, 0, 6), np.float32))
    with pytest.raises(ShapeError, match=r"\[B T 6\].*found \(2, 3, 5\)"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((2, 3, 5), np.float32))


def test_state_that_is_full_gives_nan_and_one_too_small_is_refused():
    model = build(ThreeMoonsConfig())
    x = series(steps=3)

    @jax.jit
    def fill(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, state = model.extend(x, model.init_state(2, max_len=3))
        return y, model.step(x[:, 0], state)[0]

    y, beyond = fill(x)
    assert np.isfinite(y).all()
    assert np.isnan(beyond).all()
    with pytest.raises(ShapeError, match="3 steps do not fit into a state with room for 2"):
        jax.eval_shape(lambda x: model.extend(x, model.init_state(2, max_len=2)), x)


def test_gradients_of_a_standing_still_series_are_finite():
    graphdef, params = nnx.split(build(CASES["everything"]))
    x = np.zeros((1, 8, 6), np.float32)
    x[:, 0] = 1.0
    total = jax.jit(jax.grad(lambda p, x: jnp.sum(nnx.merge(graphdef, p)(x)), argnums=(0, 1)))
    grads = total(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_complex_projection_is_the_nearest_and_idempotent():
    weight, another = np.float32(np.random.default_rng(0).normal(size=(2, 4, 6)))
    project = jax.jit(project_complex)
    projected, other = np.asarray(project(weight)), np.asarray(project(another))
    assert_close(np.asarray(project(projected)), projected)
    assert_close(np.asarray(project(weight.T)), projected.T)
    blocks = projected.reshape(2, 2, 3, 2)
    np.testing.assert_array_equal(blocks[:, 0, :, 0], blocks[:, 1, :, 1])
    np.testing.assert_array_equal(blocks[:, 0, :, 1], -blocks[:, 1, :, 0])
    # What was taken away is orthogonal to all complex matrices, so nothing nearer exists.
    assert abs(np.vdot(weight - projected, other)) < 1e-5


@pytest.mark.parametrize("complex_linear", [True, False])
def test_initial_entries_are_uniform(complex_linear: bool):
    def draw() -> tuple[jax.Array, jax.Array]:
        layer = Projection(100, 60, complex_linear=complex_linear, rngs=nnx.Rngs(0))
        return layer.kernel[...], layer.matrix()

    kernel, matrix = map(np.asarray, jax.jit(draw)())
    assert np.abs(kernel).max() <= 0.1
    # Averaging two entries of a block halves the variance of a uniform number, bound²/3.
    assert kernel.std() == pytest.approx(0.1 / np.sqrt(6 if complex_linear else 3), rel=0.03)
    np.testing.assert_array_equal(matrix, kernel)


def test_three_heads_and_one_head_have_108_parameters():
    for heads in (1, 3):
        config = ThreeMoonsConfig(num_heads=heads, head_dim=6 // heads)
        params = nnx.state(nnx.eval_shape(lambda c=config: c.build(nnx.Rngs(0))), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 108


def test_heads_side_by_side_are_what_a_projection_mixes():
    mixed, plain = build(ThreeMoonsConfig()), build(ThreeMoonsConfig(output="concat"))
    assert plain.output is None
    assert mixed.output is not None
    x = series()
    with_output = nnx.jit(lambda model, y: model.output(y))(mixed, whole(plain, x).y)
    np.testing.assert_allclose(with_output, whole(mixed, x).y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 0}, "model.num_heads=0 is not positive"),
        ({"value_ban": -1}, "model.value_ban=-1 is negative"),
        ({"output": "sum"}, "--model.output projection"),
        ({"output": "concat", "head_dim": 4}, "num_heads x head_dim=12 differs"),
        ({"num_heads": 1, "head_dim": 3}, "even widths"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(ThreeMoonsConfig(), **fields)
