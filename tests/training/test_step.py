"""The update: accumulation, masks, aux losses, dropout, precision and the non-finite guard."""

import dataclasses
import functools
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.errors import NonFiniteLoss
from jaxmem.parallel.mesh import ParallelConfig, build_mesh
from jaxmem.tasks.language_modeling import cross_entropy_sum, language_model_loss
from jaxmem.training.feed import Place
from jaxmem.training.guard import NonFiniteGuard
from jaxmem.training.layout import take_apart
from jaxmem.training.model import PRECISIONS, Model
from jaxmem.training.optim import OptimConfig, adamw, decays
from jaxmem.training.state import NEVER, StateInit
from jaxmem.training.step import Steps
from tests.helpers.tiny_run import TINY_MODEL, TinyModel, tiny_batch

ROWS = 8
"""Of every batch, so that tests share programs."""

WITH_AUX, WITH_DROPOUT = partial(TinyModel, aux=True), partial(TinyModel, dropout=0.5)


@functools.cache
def build(*, accumulate=1, mesh="", make=TinyModel, loss=language_model_loss, lr=0.05):
    """A compiled-on-call update with its first state."""
    parts = take_apart(make)
    mesh = build_mesh(ParallelConfig(mesh=mesh))
    steps = Steps(parts, loss, mesh, accumulate=accumulate)
    optimizer = adamw(OptimConfig(), lambda _: lr, parts.layout.map_shapes(decays))
    init = StateInit(make, parts, optimizer, steps.aux_names(tiny_batch(ROWS)), mesh)
    update = jax.jit(steps.update(optimizer, 1.0), out_shardings=(init.shardings, None))
    return SimpleNamespace(
        steps=steps, update=update, state=init(0), place=Place(mesh), init=init, parts=parts
    )


def test_accumulation_equals_one_large_batch_with_uneven_masks():
    batch = tiny_batch(ROWS, scored=0.5)
    batch["targets"][:2] = -1  # the first micro-batch scores nothing
    whole, parts = build(), build(accumulate=4)
    one, report = whole.update(whole.state, whole.place(batch))
    many, report_many = parts.update(parts.state, parts.place(batch))
    np.testing.assert_allclose(report_many.loss, report.loss, rtol=1e-6)
    np.testing.assert_allclose(report_many.grad_norm, report.grad_norm, rtol=2e-6)
    assert one.interval.tokens == many.interval.tokens == np.sum(batch["targets"] >= 0)
    # Adam's first update divides the gradient by its size, so compare the moments, not the step.
    chex.assert_trees_all_close(one.opt_state[0].mu, many.opt_state[0].mu, rtol=2e-5, atol=1e-8)


def test_gradient_is_that_of_the_mean_over_scored_tokens():
    run = build()
    batch = tiny_batch(ROWS, scored=0.4)
    gradient = jax.jit(run.steps.gradient())
    grads, sums = gradient(run.state.params, run.place(batch), jax.random.key(0))

    def mean(params):
        total, count = cross_entropy_sum(
            run.parts.merge(params)(batch["tokens"]).logits, batch["targets"]
        )
        return total / count

    want_loss, want = jax.jit(jax.value_and_grad(mean))(run.state.params)
    np.testing.assert_allclose(sums.loss / sums.tokens, want_loss, rtol=1e-6)
    chex.assert_trees_all_close(grads, want, rtol=1e-5, atol=1e-6)  # measured 2.7e-7


def test_cross_entropy_is_the_log_probability_and_skips_negative_targets():
    sums = jax.jit(cross_entropy_sum)
    logits = np.log(np.float32([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    total, count = sums(logits, np.array([[1, -1]]))
    np.testing.assert_allclose(total, np.log(4.0), rtol=1e-6)
    assert count == 1
    total, count = sums(logits.astype(jnp.bfloat16), np.array([[1, 2]]))
    assert total.dtype == jnp.float32
    assert count == 2


def test_a_batch_without_scored_tokens_changes_no_moment():
    run = build()
    state, report = run.update(run.state, run.place(tiny_batch(ROWS, scored=0.0)))
    assert report.loss == 0
    assert report.first_bad_step == NEVER
    chex.assert_trees_all_equal(state.opt_state[0].mu, run.state.opt_state[0].mu)


def test_aux_losses_are_trained_and_metrics_averaged():
    plain, extra = build(), build(make=WITH_AUX, accumulate=2)
    batch = tiny_batch(ROWS)
    _, plain_report = plain.update(plain.state, plain.place(batch))
    state, report = extra.update(extra.state, extra.place(batch))
    np.testing.assert_allclose(report.loss, plain_report.loss, rtol=1e-6)  # without the aux loss
    assert abs(float(report.grad_norm) - float(plain_report.grad_norm)) > 1e-3
    interval = jax.device_get(state.interval)
    mean = {name: x / interval.tokens for name, x in interval.aux.items()}
    aux = jax.jit(lambda params: extra.parts.merge(params)(batch["tokens"]).aux)
    np.testing.assert_allclose(mean["size"], aux(extra.state.params)["size"], rtol=1e-5)
    assert sorted(mean) == ["loss_size", "size"]


def test_dropout_differs_by_step_and_repeats_by_state():
    run = build(make=WITH_DROPOUT, lr=0.0)
    batch = run.place(tiny_batch(ROWS))
    first, a = run.update(run.state, batch)
    _, again = run.update(run.state, batch)
    _, b = run.update(first, batch)
    assert a.loss == again.loss
    assert a.loss != b.loss


def test_one_batch_is_overfitted():
    run = build()
    batch = tiny_batch(ROWS)
    batch["targets"] = (batch["tokens"] + 1) % 7
    placed, state = run.place(batch), run.state
    losses = []
    for _ in range(60):
        state, report = run.update(state, placed)
        losses.append(float(report.loss))
    assert losses[-1] < 0.01 * losses[0]
    assert int(state.step) == 60


def breaking_loss(model, batch, *, rngs=None):
    """A loss that is infinite, through one parameter only, when the batch begins with token 7."""
    out = language_model_loss(model, batch, rngs=rngs)
    weight = jnp.where(batch["tokens"][0, 0] == 7, jnp.inf, 0.0)
    return out._replace(total=out.total + weight * jnp.sum(1 + model.layers[1].linear.bias[...]))


def test_non_finite_update_is_refused_freezes_the_state_and_names_the_tensor():
    run = build(loss=breaking_loss)
    guard, state, flags = NonFiniteGuard(run.steps), run.state, []
    states = []
    for seed, first in enumerate((1, 7, 1)):
        batch = tiny_batch(ROWS, seed=seed)
        batch["tokens"][0, 0] = first
        placed = run.place(batch)
        state, report = run.update(state, placed)
        states.append(state)
        flags.append(int(report.first_bad_step))
        guard.add(report, placed)
        if seed < 2:
            guard.check(state, wait=False)  # the newest flag is not read yet
    assert flags == [NEVER, 1, 1]
    for later in states[1:]:
        chex.assert_trees_all_equal(
            later._replace(first_bad_step=NEVER), states[0]._replace(first_bad_step=NEVER)
        )
    with pytest.raises(NonFiniteLoss, match=r"Update 1 .* is layers\.1\.linear\.bias\. Its") as err:
        guard.check(state, wait=False)
    want = " ".join(map(str, [7, *tiny_batch(ROWS, seed=1)["tokens"][0, 1:]]))
    assert f"tokens {want}." in str(err.value)


def test_bfloat16_policy_computes_in_bfloat16_and_keeps_float32():
    model = Model(dataclasses.replace(TINY_MODEL, vocab_size=11), PRECISIONS["bfloat16"])
    batch = tiny_batch(4, length=8)
    mesh = build_mesh(ParallelConfig())
    steps = Steps(model.parts, language_model_loss, mesh)
    optimizer = optax.adamw(1e-3)
    init = StateInit(model.make, model.parts, optimizer, [], mesh)
    # That such a run learns is tried with the recipe of 2Mamba, in `tests/unit/cli`.
    state, report = jax.eval_shape(steps.update(optimizer, 1.0), init.abstract, batch)
    assert report.loss.dtype == jnp.float32
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    text = str(jax.make_jaxpr(steps.evaluate())(init.abstract.params, batch))
    assert "bf16[4,8,8]" in text  # activations B T D
    assert " f16[" not in text
