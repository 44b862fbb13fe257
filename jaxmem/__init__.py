"""Memory and attention layers in JAX, equal to their authors' code and to themselves.

The names below are the ops, what they take, and the way to choose their implementation; they are
imported when they are first used. Layers stand in `jaxmem.mixers`, whole models in
`jaxmem.backbones`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmem.ops.attention import (
        AttentionOutput,
        Dropout,
        Places,
        attention,
        attention_with_lse,
    )
    from jaxmem.ops.dispatch import explain, use_implementation
    from jaxmem.ops.gated_scan import GatedScanOutput, gated_scan
    from jaxmem.ops.leaky_average import LeakyOutput, LeakyState, leaky_average
    from jaxmem.ops.linear_attention import LinearOutput, LinearState, linear_attention
    from jaxmem.ops.persistent_read import persistent_read
    from jaxmem.ops.polynomial_attention import PolynomialOutput, polynomial_attention
    from jaxmem.ops.rope import rope
    from jaxmem.ops.sharded import sharded
    from jaxmem.ops.squared_attention import SquaredOutput, squared_attention
    from jaxmem.ops.weighted_average import WeightedOutput, WeightedState, weighted_average

__version__ = "0.1.0"

_HOMES = {
    "AttentionOutput": "jaxmem.ops.attention",
    "Dropout": "jaxmem.ops.attention",
    "GatedScanOutput": "jaxmem.ops.gated_scan",
    "LeakyOutput": "jaxmem.ops.leaky_average",
    "LeakyState": "jaxmem.ops.leaky_average",
    "LinearOutput": "jaxmem.ops.linear_attention",
    "LinearState": "jaxmem.ops.linear_attention",
    "Places": "jaxmem.ops.attention",
    "PolynomialOutput": "jaxmem.ops.polynomial_attention",
    "SquaredOutput": "jaxmem.ops.squared_attention",
    "WeightedOutput": "jaxmem.ops.weighted_average",
    "WeightedState": "jaxmem.ops.weighted_average",
    "attention": "jaxmem.ops.attention",
    "attention_with_lse": "jaxmem.ops.attention",
    "explain": "jaxmem.ops.dispatch",
    "gated_scan": "jaxmem.ops.gated_scan",
    "leaky_average": "jaxmem.ops.leaky_average",
    "linear_attention": "jaxmem.ops.linear_attention",
    "persistent_read": "jaxmem.ops.persistent_read",
    "polynomial_attention": "jaxmem.ops.polynomial_attention",
    "rope": "jaxmem.ops.rope",
    "sharded": "jaxmem.ops.sharded",
    "squared_attention": "jaxmem.ops.squared_attention",
    "use_implementation": "jaxmem.ops.dispatch",
    "weighted_average": "jaxmem.ops.weighted_average",
}

__all__ = [
    "AttentionOutput",
    "Dropout",
    "GatedScanOutput",
    "LeakyOutput",
    "LeakyState",
    "LinearOutput",
    "LinearState",
    "Places",
    "PolynomialOutput",
    "SquaredOutput",
    "WeightedOutput",
    "WeightedState",
    "attention",
    "attention_with_lse",
    "explain",
    "gated_scan",
    "leaky_average",
    "linear_attention",
    "persistent_read",
    "polynomial_attention",
    "rope",
    "sharded",
    "squared_attention",
    "use_implementation",
    "weighted_average",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxmem' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
