"""On a GPU a weighted average takes the kernels of the gated scan."""

import jax
import jax.numpy as jnp
import pytest

from jaxmem.ops.weighted_average import weighted_average
from pallas_kernels._compat import lower_for_cuda
from tests.helpers.lowering import kernel_names


@pytest.mark.parametrize("implementation", ["auto", "pallas", "xla"])
def test_kernels_of_both_passes_are_called(implementation: str):
    values = jax.ShapeDtypeStruct((2, 100, 4, 24), jnp.bfloat16)
    per_head = jax.ShapeDtypeStruct((2, 100, 4, 1), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 100), jnp.int32)

    def loss(v: jax.Array, k: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
        y, _ = weighted_average(v, k, w, segment_ids=ids, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), values, per_head, per_head, ids)
    wanted = [] if implementation == "xla" else ["gated_forward", "gated_backward"]
    assert kernel_names(lowered) == wanted
    # A step per token would be a launch per token.
    assert "stablehlo.while" not in lowered.as_text()
