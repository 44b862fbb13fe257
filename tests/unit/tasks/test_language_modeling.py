"""Positions that are not scored because they have no context yet."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import configs
from jaxmem.errors import ConfigError
from jaxmem.tasks.language_modeling import (
    LanguageModelingConfig,
    cross_entropy_sum,
    language_model_loss,
)
from tests.helpers.tiny_run import Output, tiny_batch


def model(tokens, *, segment_ids=None, rngs=None):
    logits = jnp.cos(jnp.arange(tokens.size * 11.0)).reshape(*tokens.shape, 11)
    return Output(logits, None, {})


def test_first_positions_may_go_without_a_score():
    batch = tiny_batch(3)
    found = jax.jit(lambda batch: language_model_loss(model, batch, skip_tokens=2))(batch)
    later = {**batch, "targets": batch["targets"].copy()}
    later["targets"][:, :2] = -1
    logits = jax.jit(lambda tokens: model(tokens).logits)(batch["tokens"])
    total, count = jax.jit(cross_entropy_sum)(logits, later["targets"])
    assert (int(found.count), int(count)) == (9, 9)
    assert float(found.total) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize("skip", [-1, 64])
def test_something_must_be_scored(skip: int):
    preset = configs.load("mm_tiny")
    with pytest.raises(ConfigError, match=rf"task\.skip_tokens={skip}.*context_len=64"):
        dataclasses.replace(preset, task=LanguageModelingConfig(skip_tokens=skip))
