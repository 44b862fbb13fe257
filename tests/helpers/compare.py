"""Comparison by two criteria together, because each alone is blind to something.

Elementwise differences are too strict near zero and too lax on scale; the relative RMS error hides
a single wrong row.
"""

from typing import Any, NamedTuple

import chex
import jax
import numpy as np


class Budget(NamedTuple):
    """How far two computations of one thing may be apart."""

    rtol: float
    """Of an element, relative to itself."""
    atol: float
    """Of an element, relative to the largest of its array (absolute where all are zero)."""
    rms: float
    """Of the whole array: ‖a − b‖ / ‖b‖."""


# Each line is about three times the largest error measured in the tests that use it
# (float32, matrix products at highest precision, CPU).
FORWARD = Budget(rtol=1e-5, atol=1e-5, rms=2e-6)
GRADIENT = Budget(rtol=5e-5, atol=5e-5, rms=1e-5)
BFLOAT16 = Budget(rtol=5e-2, atol=5e-2, rms=1e-2)


def rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖actual − expected‖ / ‖expected‖, absolute where expected is zero."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (norm or 1.0)


def assert_close(actual: Any, expected: Any, budget: Budget = FORWARD) -> None:
    """Compare two pytrees of arrays, in float64, by both criteria."""
    chex.assert_trees_all_equal_structs(actual, expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, wanted), leaf in zip(paths, jax.tree.leaves(actual), strict=True):
        a, b = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
        where = jax.tree_util.keystr(path)
        atol = budget.atol * (np.max(np.abs(b), initial=0.0) or 1.0)
        chex.assert_trees_all_close(a, b, rtol=budget.rtol, atol=atol, custom_message=where)
        error = rms_error(a, b)
        assert error <= budget.rms, f"{where}: relative RMS error {error:.2e} > {budget.rms:.0e}"
