"""The measures at the end of a run: regions, generation from every context, the verdict."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.three_moons import ThreeMoons, ThreeMoonsConfig, continue_series
from jaxmem.data.three_moons import positions, time_step
from jaxmem.tasks.three_moons_plots import Errors, block_magnitudes
from jaxmem.tasks.three_moons_report import (
    SYSTEMS,
    by_region,
    generation_errors,
    judge,
    measure,
    region_table,
)
from tests.helpers.drawn import drawn

LENGTH, HORIZON = 20, 4
SERIES = np.float32(positions((0.5, 1.0, 2.5), 5, LENGTH + HORIZON, step=time_step(LENGTH)))


@pytest.fixture(scope="module")
def model() -> ThreeMoons:
    return build(ThreeMoonsConfig(context_len=LENGTH))


def build(config: ThreeMoonsConfig) -> ThreeMoons:
    return drawn(lambda: ThreeMoons(config, rngs=nnx.Rngs(0)), spread=0.2)


@pytest.mark.parametrize("method", ["cached", "released"])
def test_generation_from_the_shared_state_equals_one_prompt_at_a_time(model: ThreeMoons, method):
    contexts = np.array([1, 2, 9, LENGTH])
    measured = jax.jit(lambda x: generation_errors(model, x, contexts, HORIZON, method))(SERIES)
    expected = []
    for context in contexts:
        prompt = SERIES[None, :context]
        generated = jax.jit(lambda p: continue_series(model, p, HORIZON, method=method))(prompt)
        # The released metric compares with what stood one step before, so the truth is the same.
        truth = SERIES[context : context + HORIZON]
        expected.append(np.abs(np.asarray(generated[0]) - truth).mean())
    # Attention scale 50 magnifies rounding; largest error measured 3e-7.
    np.testing.assert_allclose(measured, expected, atol=2e-6)


def test_a_perfect_memory_of_a_repeating_series_has_no_error_after_its_period():
    """Identity matrices and a sharp comparison continue what followed the same state before."""
    model = build(ThreeMoonsConfig(context_len=90, attention_scale=1e5))
    for layer in (model.key, model.value, model.output):
        layer.kernel[...] = np.eye(6)
    periods, step = (0.5, 1.0, 2.0), time_step(90)
    series = np.float32(positions(periods, 0, 95, step=step))[None]
    errors = measure(model, {"moons": series}, {"moons": periods}, step=step, horizon=5)["moons"]
    assert errors.regions[-1] < 1e-5
    assert errors.regions[0] > 0.1
    assert len(errors.contexts) == len(errors.generated) == 90
    assert errors.generated[-1] < 1e-5


def test_regions_are_split_at_the_periods():
    errors = np.arange(10.0)  # times 0, 0.5, ... 4.5
    found = by_region(errors, (0.5, 1.0, 1.5), 0.5)  # the system repeats after 3
    assert found == [0.0, np.mean([1, 2]), np.mean([3, 4, 5]), np.mean([6, 7, 8, 9])]


def errors(decisive: dict[str, float], repeated: float = 0.03) -> dict[str, Errors]:
    return {
        name: Errors(SYSTEMS[name], (0.4, 0.2, value, repeated), (1,), (0.1,))
        for name, value in decisive.items()
    }


@pytest.mark.parametrize(
    ("expect", "training", "validation", "repeated", "holds"),
    [
        ("orbit", 0.033, 0.047, 0.037, True),  # the authors' numbers
        ("orbit", 0.033, 0.140, 0.037, False),
        ("orbit", 0.291, 0.047, 0.037, False),
        ("orbit", 0.033, 0.047, 0.3, False),
        ("system", 0.291, 0.140, 0.042, True),
        ("system", 0.291, 0.047, 0.042, False),
        ("system", 0.6, 0.6, 0.6, False),
        ("orbit", float("nan"), 0.047, 0.037, False),
    ],
)
def test_verdict(expect, training: float, validation: float, repeated: float, holds: bool):
    found = errors({"training": training, "validation": validation}, repeated)
    verdict = judge(found, expect)
    assert verdict.holds is holds
    assert ("DOES NOT HOLD" in verdict.text) is not holds
    assert f"training {training:.3f} (authors' equations 0." in verdict.text
    assert judge(found, "nothing").holds is None


def test_table_names_the_periods():
    text = region_table(errors({"training": 0.03, "validation": 0.05}))
    assert text.splitlines()[2] == "| training (0.5, 1, 2.5) | 0.400 | 0.200 | 0.030 | 0.030 |"


def test_block_magnitude_is_the_stretch_of_a_complex_number():
    p, q = 0.6, -0.8
    matrix = np.block([[np.array([[p, q], [-q, p]]) * 2, np.zeros((2, 2))]])
    np.testing.assert_allclose(block_magnitudes(matrix), [[2.0, 0.0]])
    assert block_magnitudes(np.ones((3, 2))).shape == (2, 1)
