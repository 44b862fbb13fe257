"""The optimiser: AdamW with a decay mask, its learning-rate schedule, and gradient clipping."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmem.errors import ConfigError

CLIP_EPS = 1e-6
"""Added to the norm when clipping, as the reference training code does."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, clipping and accumulation."""

    lr: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the end of `cosine` and `linear` and after it; unused by the others."""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """What follows the warm-up: a half cosine or a straight line down to `min_lr`, drops at
    `milestones`, or `lr`."""
    warmup_steps: int = 100
    """Updates of linear warm-up from 0; the first update has learning rate 0. A run that is no
    longer than this only warms up."""
    decay_steps: int = 0
    """Update at which `cosine` and `linear` reach `min_lr`; 0 means `run.steps`."""
    milestones: tuple[int, ...] = (10_000,)
    """Updates from which on the rate of schedule `step` is `gamma` times smaller, rising."""
    gamma: float = 0.2
    """Factor of the rate at each of the `milestones`."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two or more axes, times the learning rate."""
    decay_all: bool = False
    """Decay the others too: norms, biases, rates and scalars (2Mamba)."""
    clip_norm: float = 1.0
    """Gradients are scaled so that their global norm is at most this; 0 means no clipping."""
    accumulate: int = 1
    """Micro-batches per update; `data.batch_size` is split into so many parts."""

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0, "greater than 0"),
            "min_lr": (0 <= self.min_lr <= self.lr, f"between 0 and optim.lr={self.lr}"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "decay_steps": (self.decay_steps >= 0, "0 (= run.steps) or more"),
            "milestones": (self._milestones_rise(), "rising, each after optim.warmup_steps"),
            "gamma": (0 < self.gamma <= 1, "in (0, 1]"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "greater than 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip_norm": (self.clip_norm >= 0, "0 (= off) or more"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
        }
        for field, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(
                    f"`optim.{field}={getattr(self, field)}` must be {expected}. "
                    f"Give another `--optim.{field.replace('_', '-')}`."
                )

    def _milestones_rise(self) -> bool:
        if self.schedule != "step":
            return True
        places = (self.warmup_steps, *self.milestones)
        return all(a < b for a, b in itertools.pairwise(places))


class DecayGroup(NamedTuple):
    """One row of the weight-decay table."""

    decay: float
    names: tuple[str, ...]
    count: int
    """Number of scalars in the group."""


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Build the schedule as a function of the number of updates done.

    it < warmup: lr it / warmup. Then, by `config.schedule`:
    cosine: min_lr + (1 + cos(pi (it - warmup) / (decay - warmup))) (lr - min_lr) / 2 up to decay,
    min_lr after it; where decay <= warmup, lr at `it` = warmup and min_lr from the next update on;
    linear: lr + (min_lr - lr) (it - warmup) / (decay - warmup), min_lr after it, alike;
    step: lr gamma^n, n = number of milestones <= it;
    constant: lr.

    Args:
      config: rates and lengths.
      steps: `run.steps`, where the decay ends if `decay_steps` is 0.
    """
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "step":
        after = optax.piecewise_constant_schedule(
            config.lr, {it - config.warmup_steps: config.gamma for it in config.milestones}
        )
    else:
        length = max((config.decay_steps or steps) - config.warmup_steps, 1)
        after = (
            optax.linear_schedule(config.lr, config.min_lr, length)
            if config.schedule == "linear"
            else optax.cosine_decay_schedule(config.lr, length, alpha=config.min_lr / config.lr)
        )
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decays(shape: tuple[int, ...]) -> bool:
    """Say whether a parameter of this shape is decayed: matrices are, vectors are not."""
    return len(shape) >= 2


def adamw(
    config: OptimConfig, schedule: optax.Schedule, mask: Mapping[str, bool]
) -> optax.GradientTransformation:
    r"""Build AdamW: p <- p - lr (wd p + m / (\sqrt{v} + eps)), wd = 0 where masked out.

    With `config.decay_all` nothing is masked out.
    """
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask={name: config.decay_all or wanted for name, wanted in mask.items()},
    )


def clip_by_norm(
    grads: dict[str, jax.Array], norm: jax.Array, limit: float
) -> dict[str, jax.Array]:
    """Scale gradients by min(1, limit / (norm + 1e-6)).

    Differs: optax.clip_by_global_norm divides by the bare norm; the reference code adds 1e-6.
    """
    if not limit:
        return grads
    scale = jnp.minimum(1.0, limit / (norm + CLIP_EPS))
    return jax.tree.map(lambda g: g * scale, grads)


def decay_groups(
    shapes: Mapping[str, tuple[int, ...]], config: OptimConfig
) -> tuple[DecayGroup, DecayGroup]:
    """List which parameters are decayed and which are not, with their scalar counts."""

    def group(decay: float, wanted: bool) -> DecayGroup:
        names = tuple(
            name for name, shape in shapes.items() if (config.decay_all or decays(shape)) == wanted
        )
        return DecayGroup(decay, names, sum(math.prod(shapes[name]) for name in names))

    return group(config.weight_decay, True), group(0.0, False)
