"""The gated scan over packed rows of any layout and gates of any size, cut anywhere."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.ops.gated_scan import gated_scan
from pallas_kernels.gated_scan import GatedScanConfig
from tests.helpers.compare import FORWARD, assert_close

LENGTH = 9  # one shape, so that every form is compiled once
small = settings(max_examples=60, deadline=None)
ids_of_row = st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=LENGTH, max_size=LENGTH)
gates_of_row = st.lists(
    st.sampled_from([0.0, -1e-6, -0.3, -2.0, -1e4, -np.inf]), min_size=LENGTH, max_size=LENGTH
)
SPLIT = GatedScanConfig(rows=2, span=2, programs=10**6)


@functools.cache
def compiled(implementation: str) -> Callable:
    def run(x: jax.Array, log_decay: jax.Array, start: jax.Array, ids: jax.Array) -> tuple:
        return gated_scan(
            x,
            log_decay,
            initial_state=start,
            segment_ids=ids,
            initial_segment=jnp.array([1]),
            implementation=implementation,
            config=SPLIT,
        )

    return jax.jit(run)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@small
@given(ids=ids_of_row, gates=gates_of_row)
def test_gated_scan_of_packed_rows(implementation: str, ids: list[int], gates: list[float]):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(1, LENGTH, 2)).astype(np.float32)
    start = draw.normal(size=(1, 2)).astype(np.float32)
    log_decay = np.broadcast_to(np.float32(gates)[:, None], x.shape[1:])[None]
    out = compiled(implementation)(x, log_decay, start, np.asarray([ids]))
    h, final, document = np.zeros(x.shape), start.astype(np.float64), 1
    for t, name in enumerate(ids):
        if name:
            kept = np.exp(gates[t]) if name == document else 0.0
            document = name
            final = kept * final + x[:, t]
            h[:, t] = final
    assert_close(tuple(out), (h, final), FORWARD)
