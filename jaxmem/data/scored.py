"""Rows of tokens of which some are scored, as tasks draw them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

NOT_SCORED = -1
"""Target of a token whose successor is not asked for."""


class ScoredRows(NamedTuple):
    """Rows of tokens, and what is asked for in them."""

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    """The token after each that is scored, `NOT_SCORED` elsewhere."""
