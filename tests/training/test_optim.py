"""Schedules, decay groups, clipping, and AdamW against the update rule written out."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from jaxmem.errors import ConfigError
from jaxmem.training.config import RunOptions
from jaxmem.training.optim import (
    OptimConfig,
    adamw,
    clip_by_norm,
    decay_groups,
    decays,
    learning_rate,
)


def upstream_rate(it: int, c: OptimConfig, decay: int) -> float:
    if it < c.warmup_steps:
        return c.lr * it / c.warmup_steps
    if it > decay:
        return c.min_lr
    ratio = (it - c.warmup_steps) / (decay - c.warmup_steps)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.lr - c.min_lr)


@pytest.mark.parametrize("decay", [0, 50], ids=["decay=steps", "decay=50"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine_is_the_reference_formula_at_every_step(warmup, decay):
    config = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=warmup, decay_steps=decay)
    got = jax.jit(jax.vmap(learning_rate(config, 100)))(np.arange(120))
    want = np.array([upstream_rate(it, config, decay or 100) for it in range(120)])
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("steps", [4, 10], ids=["shorter", "equal"])
def test_a_run_no_longer_than_the_warm_up_only_warms_up(steps):
    config = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10)
    dataclasses.replace(
        configs.load("mm_tiny"), optim=config, run=RunOptions(steps=steps)
    )  # is no mistake
    got = np.array([learning_rate(config, steps)(it) for it in range(13)])
    want = [1e-4 * it for it in range(10)] + [1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)


def test_first_update_has_rate_zero_and_constant_stays():
    rate = learning_rate(OptimConfig(schedule="constant", lr=0.5, warmup_steps=4), 100)
    assert [float(rate(it)) for it in (0, 2, 4, 5, 1000)] == [0.0, 0.25, 0.5, 0.5, 0.5]


def test_a_line_falls_from_lr_to_min_lr_and_stays():
    config = OptimConfig(schedule="linear", lr=0.5, min_lr=0.1, warmup_steps=2)
    got = [float(learning_rate(config, 10)(it)) for it in (0, 1, 2, 4, 6, 10, 99)]
    np.testing.assert_allclose(got, [0.0, 0.25, 0.5, 0.4, 0.3, 0.1, 0.1], rtol=1e-6)
    shorter = OptimConfig(schedule="linear", lr=0.5, min_lr=0.1, warmup_steps=0, decay_steps=4)
    np.testing.assert_allclose(learning_rate(shorter, 10)(2), 0.3, rtol=1e-6)


def test_steps_shrink_the_rate_at_each_milestone():
    config = OptimConfig(schedule="step", lr=0.5, warmup_steps=4, milestones=(6, 9), gamma=0.2)
    rate = learning_rate(config, 100)
    got = [float(rate(it)) for it in range(12)]
    want = [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, *[0.1] * 3, *[0.02] * 3]
    np.testing.assert_allclose(got, want, rtol=2e-6)
    flat = OptimConfig(schedule="step", lr=0.5, warmup_steps=0, milestones=())
    assert [float(learning_rate(flat, 100)(it)) for it in (0, 50_000)] == [0.5, 0.5]


@pytest.mark.parametrize("milestones", [(300, 200), (300, 300), (100,), (50, 300)])
def test_milestones_that_do_not_rise_are_refused(milestones):
    fields = {"schedule": "step", "warmup_steps": 100, "milestones": milestones}
    with pytest.raises(ConfigError, match=r"optim\.milestones=.*rising.*--optim\.milestones"):
        OptimConfig(**fields)
    OptimConfig(**fields | {"schedule": "cosine"})  # which does not use them


def test_clipping_scales_to_the_limit_and_leaves_small_gradients():
    grads = {"a": np.array([3.0, 4.0], np.float32)}
    clipped = clip_by_norm(grads, jnp.array(5.0), 1.0)["a"]
    np.testing.assert_allclose(clipped, np.array([3.0, 4.0]) / (5.0 + 1e-6), rtol=1e-7)
    chex.assert_trees_all_equal(clip_by_norm(grads, jnp.array(5.0), 10.0), grads)
    chex.assert_trees_all_equal(clip_by_norm(grads, jnp.array(5.0), 0.0), grads)


def test_adamw_decays_matrices_only_and_follows_the_rule():
    c = OptimConfig(weight_decay=0.1, beta1=0.9, beta2=0.95)
    params = {"w": np.full((2, 2), 2, np.float32), "b": np.full((2,), 2, np.float32)}
    optimizer = adamw(c, lambda _: 0.01, {k: decays(v.shape) for k, v in params.items()})
    state = jax.jit(optimizer.init)(params)
    m = v = 0.0
    want = {"w": 2.0, "b": 2.0}

    @jax.jit
    def update(g, state, params):
        grads = jax.tree.map(lambda p: jnp.full_like(p, g), params)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for it, g in enumerate([1.0, -0.5, 0.25], start=1):
        params, state = update(g, state, params)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**it)) / (math.sqrt(v / (1 - 0.95**it)) + 1e-8)
        want = {"w": want["w"] - 0.01 * (0.1 * want["w"] + step), "b": want["b"] - 0.01 * step}
    for name, value in want.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-6)


def test_decay_groups_list_every_parameter_once():
    shapes = {"embed": (11, 8), "norm": (8,), "table": (2, 3, 4), "scale": ()}
    decayed, plain = decay_groups(shapes, OptimConfig(weight_decay=0.3))
    assert decayed == (0.3, ("embed", "table"), 88 + 24)
    assert plain == (0.0, ("norm", "scale"), 9)


def test_all_parameters_may_be_decayed():
    c = OptimConfig(weight_decay=0.5, decay_all=True)
    params = {"w": np.full((2, 2), 2, np.float32), "b": np.full((2,), 2, np.float32)}
    optimizer = adamw(c, lambda _: 0.1, {k: decays(v.shape) for k, v in params.items()})

    @jax.jit
    def first_update(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    updates = first_update(params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.1 * 0.5 * params[name], rtol=1e-6)
    shapes = {name: value.shape for name, value in params.items()}
    assert decay_groups(shapes, c) == ((0.5, ("w", "b"), 6), (0.0, (), 0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("min_lr", 1.0),
        ("beta2", 1.0),
        ("gamma", 0.0),
        ("gamma", 1.5),
        ("accumulate", 0),
        ("clip_norm", -1.0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=f"optim.{field}={value}"):
        OptimConfig(**{field: value})
