"""What adapters share: modules as functions of parameters, and gradients of golden scalars."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.interop.names import Names, to_original, to_ours
from jaxmem.training.layout import ModelParts, take_apart
from tests.golden.adapters import Arrays, Golden, cast

Values = dict[str, jax.Array]
Forward = Callable[[Values, Values], Values]
"""(parameters, inputs) -> outputs, each by name."""


class Loaded(NamedTuple):
    """A module taken apart, and its parameters from a golden file."""

    parts: ModelParts
    params: Values
    """By our dotted path."""
    names: Names


def load_module(
    golden: Golden, make: Callable[[nnx.Rngs], nnx.Module], names: Names, dtype: np.dtype
) -> Loaded:
    """Build a module abstractly and take its parameters from the file, in `dtype`."""
    parts = take_apart(make)
    shapes = {path: leaf.shape for path, leaf in parts.layout.shapes.items()}
    return Loaded(parts, cast(to_ours(names, golden.group("param"), shapes), dtype), names)


def module_results(
    golden: Golden, loaded: Loaded, run: Callable[[Any, Values], Values], dtype: np.dtype
) -> list[Arrays]:
    """Run a module once and differentiate sum(output · cotangent)."""

    def forward(params: Values, inputs: Values) -> Values:
        return run(loaded.parts.merge_single(params), inputs)

    function = jax.jit(with_gradients(forward, cast(golden.group("cotangent"), dtype)))
    outputs, grads, input_grads = function(loaded.params, golden.inputs(dtype))
    return [keyed(outputs, to_original(loaded.names, grads), input_grads)]


def with_gradients(
    forward: Forward, cotangents: Values
) -> Callable[[Values, Values], tuple[Values, Values, Values]]:
    """Return (parameters, inputs) -> outputs and both gradients of sum(output · cotangent)."""

    def function(params: Values, inputs: Values) -> tuple[Values, Values, Values]:
        exact = {n: x for n, x in inputs.items() if not jnp.issubdtype(x.dtype, jnp.floating)}
        smooth = {n: x for n, x in inputs.items() if n not in exact}

        def scalar(params: Values, smooth: Values) -> tuple[jax.Array, Values]:
            outputs = forward(params, exact | smooth)
            return sum(jnp.vdot(outputs[n], c) for n, c in cotangents.items()), outputs

        grad = jax.grad(scalar, argnums=(0, 1), has_aux=True)
        (by_params, by_inputs), outputs = grad(params, smooth)
        return outputs, by_params, by_inputs

    return function


def keyed(outputs: Mapping[str, Any], *grads: Mapping[str, Any]) -> Arrays:
    """Name results as golden files do."""
    named = {f"output/{name}": np.asarray(a) for name, a in outputs.items()}
    for group in grads:
        named |= {f"grad/{name}": np.asarray(a) for name, a in group.items()}
    return named
