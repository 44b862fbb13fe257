"""Which kernels a leaky average launches: with every default entry, and under vmap."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxmem.ops.leaky_average import leaky_average
from pallas_kernels._compat import lower_for_cuda
from pallas_kernels._launch import Entry, entries
from pallas_kernels._lock import launches
from pallas_kernels.leaky_average import NAME, LeakyAverageConfig, cases
from pallas_kernels.leaky_average.launch import layout
from tests.helpers.lowering import kernel_names, locked_names


def label(entry: Entry) -> str:
    return f"{entry.dtype}-w{entry.width}-t{entry.length}-r{entry.rows}"


@pytest.mark.parametrize("entry", launches(NAME, "default"), ids=label)
def test_the_kernels_of_every_entry(entry: Entry):
    for case, (name, kernels) in zip(cases(entry), locked_names(NAME, entry), strict=True):
        x = case.operands[0][0]
        splits = layout(LeakyAverageConfig(**entry.config), x.shape).splits
        first = case.name.replace("forward", "ends").replace("backward", "handed")
        wanted = [first, case.name] if splits > 1 else [case.name]
        assert (name, kernels) == (case.name, wanted)


def test_the_table_has_split_and_whole_entries_of_every_dtype():
    for dtype in ("bfloat16", "float16", "float32"):
        mine = [e for e in entries(NAME) if e.dtype == dtype]
        assert {e.width for e in mine} == {256}
        shapes = [(e, (e.rows // 4, e.length, 4, e.width)) for e in mine]
        splits = {layout(LeakyAverageConfig(**e.config), shape).splits for e, shape in shapes}
        assert min(splits) == 1
        assert max(splits) > 1


@pytest.mark.parametrize("implementation", ["auto", "pallas", "xla"])
@pytest.mark.parametrize(("dtype", "scaling"), [(jnp.float32, "sum"), (jnp.bfloat16, "normalised")])
def test_kernels_of_both_passes_are_called_under_vmap(
    dtype: jnp.dtype, scaling: str, implementation: str
):
    x = jax.ShapeDtypeStruct((2, 3, 100, 2, 40), dtype)
    rate = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(x: jax.Array, rate: jax.Array) -> jax.Array:
        options = {"scaling": scaling, "implementation": implementation}
        run = functools.partial(leaky_average, rate=rate, **options)
        return jnp.sum(jax.vmap(run)(x)[0].astype(jnp.float32))

    lowered = lower_for_cuda(jax.grad(loss, argnums=(0, 1)), x, rate)
    wanted = [] if implementation == "xla" else ["leaky_forward", "leaky_backward"]
    assert kernel_names(lowered) == wanted
