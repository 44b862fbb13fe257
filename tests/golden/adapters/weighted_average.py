"""Golden files of Memory Mosaics for the general gated weighted average behind its CUDA kernel."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmem.ops.dispatch import Implementation, implementations
from jaxmem.ops.weighted_average import weighted_average
from tests.golden.adapters import Arrays, Golden, cast
from tests.golden.adapters.common import Values, keyed, with_gradients

SYSTEM = "memory_mosaics"


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file is one of the op."""
    return "gated weighted" in str(meta.get("module", ""))


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Run the op on (B, T, C) inputs, as one head, in every implementation it has."""

    def forward(implementation: Implementation, params: Values, inputs: Values) -> Values:
        y, _ = weighted_average(
            inputs["v"][:, :, None],
            inputs["k"][:, :, None],
            params["w"],
            bonus=params["u"],
            implementation=implementation,
        )
        return {"y": y[:, :, 0]}

    cotangents = cast(golden.group("cotangent"), dtype)

    @jax.jit
    def function(params: Values, inputs: Values) -> list[tuple[Values, Values, Values]]:
        # Kernels know no float64.
        forms = [
            f for f in implementations("weighted_average") if f != "pallas" or dtype != np.float64
        ]
        forwards = (partial(forward, form) for form in forms)
        return [with_gradients(f, cotangents)(params, inputs) for f in forwards]

    runs = function(cast(golden.group("param"), dtype), golden.inputs(dtype))
    return [keyed(outputs, *grads) for outputs, *grads in runs]
