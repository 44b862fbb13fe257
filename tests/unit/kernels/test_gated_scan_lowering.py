"""Which kernels a gated scan launches: with every entry of the default table, and under vmap."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmem.ops.gated_scan import gated_scan
from pallas_kernels._compat import lower_for_cuda
from pallas_kernels._launch import Entry, entries
from pallas_kernels._lock import launches
from pallas_kernels.gated_scan import NAME, GatedScanConfig, cases
from pallas_kernels.gated_scan.launch import layout
from tests.helpers.lowering import kernel_names, locked_names


def label(entry: Entry) -> str:
    return f"{entry.dtype}-w{entry.width}-t{entry.length}-r{entry.rows}"


@pytest.mark.parametrize("entry", launches(NAME, "default"), ids=label)
def test_the_kernels_of_every_entry(entry: Entry):
    for case, (name, kernels) in zip(cases(entry), locked_names(NAME, entry), strict=True):
        x = case.operands[0][0]
        splits = layout(GatedScanConfig(**entry.config), x.shape).splits
        first = case.name.replace("forward", "ends").replace("backward", "handed")
        wanted = [first, case.name] if splits > 1 else [case.name]
        assert (name, kernels) == (case.name, wanted)


def test_any_number_of_rows_lowers():
    x = jax.ShapeDtypeStruct((2, 100, 72), jnp.float32)
    run = functools.partial(
        gated_scan, implementation="pallas", config=GatedScanConfig(rows=3, num_warps=1)
    )
    assert kernel_names(lower_for_cuda(run, x, x)) == ["gated_forward"]


def test_the_table_has_every_dtype_and_short_and_long_rows():
    for dtype in ("bfloat16", "float16", "float32"):
        mine = {(e.width, e.length) for e in entries(NAME) if e.dtype == dtype}
        assert mine == {(256, 2048), (256, 32768)}


@pytest.mark.parametrize("implementation", ["auto", "pallas", "xla"])
def test_kernels_of_both_passes_are_called_under_vmap(implementation: str):
    x = jax.ShapeDtypeStruct((2, 3, 100, 72), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def loss(x: jax.Array, log_decay: jax.Array) -> jax.Array:
        run = jax.vmap(lambda *args: gated_scan(*args, implementation=implementation)[0])
        return jnp.sum(run(x, log_decay).astype(jnp.float32))

    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1)), x, log_decay)
    wanted = [] if implementation == "xla" else ["gated_forward", "gated_backward"]
    assert kernel_names(lowered) == wanted
    assert ("while" in lowered.as_text()) is False
