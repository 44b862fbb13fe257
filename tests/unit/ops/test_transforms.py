"""Every transformation of JAX on every form of every op; docs/transforms.md is what is found here.

`python -m tests.unit.ops.test_transforms` writes that page.
"""

if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - the devices and the precision of the tests

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.sharding import PartitionSpec

from jaxmem.errors import JaxmemError
from jaxmem.ops.dispatch import implementations
from pallas_kernels._compat import make_mesh
from tests.helpers.compare import Budget, assert_close
from tests.helpers.op_calls import CALLS, Call

PAGE = Path(__file__).parents[3] / "docs" / "transforms.md"
# Second derivatives of orders of 1 in float32, by two different algorithms.
SECOND_ORDER = Budget(rtol=2e-4, atol=1e-4, rms=5e-5)


def floats(tree: Any) -> list[jax.Array]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


class Tried:
    """A call with one implementation, as functions of its operands."""

    def __init__(self, call: Call, implementation: str):
        self.call, self.implementation = call, implementation

    def run(self, operands: dict[str, jax.Array]) -> list[jax.Array]:
        """Return all outputs, with 0 for the log-sum-exp of nothing."""
        found = floats(self.call.run(**operands, implementation=self.implementation))
        return [jnp.where(y == -jnp.inf, 0.0, y) for y in found]

    def total(self, operands: dict[str, jax.Array]) -> jax.Array:
        """Return a function of all outputs that is linear in none of them."""
        return sum(jnp.sum(jnp.sin(1.3 * y)) for y in self.run(operands))

    def forward(self, operands: Any) -> Any:
        return jax.jvp(self.run, (operands,), (direction(operands),))

    def reverse(self, operands: Any) -> Any:
        return jax.grad(self.total)(operands)

    def forward_over_reverse(self, operands: Any) -> Any:
        return jax.jvp(self.reverse, (operands,), (direction(operands),))[1]

    def reverse_over_reverse(self, operands: Any) -> Any:
        def along(operands: Any) -> jax.Array:
            pairs = zip(floats(self.reverse(operands)), floats(direction(operands)), strict=True)
            return sum(jnp.sum(a * b) for a, b in pairs)

        return jax.grad(along)(operands)

    def vmapped(self, operands: Any) -> Any:
        return jax.vmap(self.run)(jax.tree.map(lambda a: jnp.stack([a, -a]), operands))

    def sharded(self, operands: Any) -> Any:
        """Take gradients inside a `shard_map` with its default check, rows over two devices."""
        mesh = make_mesh((2,), ("rows",), jax.devices()[:2])
        rows = {n: axes.strip("-").startswith("B") for n, axes in self.call.axes.items()}
        split = {n: PartitionSpec("rows") if by else PartitionSpec() for n, by in rows.items()}
        return jax.shard_map(self.reverse, mesh=mesh, in_specs=(split,), out_specs=split)(operands)


def direction(operands: Any) -> Any:
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), operands)


DERIVATIVES: dict[str, Callable[[Tried, Any], Any]] = {
    "jvp": Tried.forward,
    "grad": Tried.reverse,
    "jvp of grad": Tried.forward_over_reverse,
    "grad of grad": Tried.reverse_over_reverse,
}


@functools.cache
def derivatives(name: str, implementation: str) -> dict[str, Any]:
    """Return all derivatives of a call, computed by one program."""
    tried = Tried(CALLS[name], implementation)
    run = jax.jit(lambda operands: {n: of(tried, operands) for n, of in DERIVATIVES.items()})
    return run(CALLS[name].operands())


@pytest.mark.parametrize("name", CALLS)
def test_all_derivatives_of_the_xla_form_are_those_of_the_reference(name: str):
    found, expected = (derivatives(name, form) for form in ("xla", "reference"))
    assert_close(found, expected, SECOND_ORDER)
    both = (found[mode] for mode in ("jvp of grad", "grad of grad"))
    assert_close(*both, SECOND_ORDER)  # a Hessian is symmetric


def lowers(run: Callable[[Any], Any], *operands: Any) -> bool:
    """Return whether a function of operands can be lowered; only our errors may say no."""
    try:
        jax.jit(lambda *a: run(*a)).lower(*operands)
    except JaxmemError:
        return False
    except TypeError as error:
        # JAX's own words for forward mode of a custom reverse mode.
        if re.search(r"forward-mode.*custom_vjp", str(error)) is None:
            raise
        return False
    return True


def exports(tried: Tried, axes: str) -> bool:
    """Return whether a call is exported with axes of unknown size; it then has to compute right."""
    unknown = dict(zip(axes, jax.export.symbolic_shape(", ".join(axes.lower())), strict=True))
    if "T" in unknown:
        unknown["S"] = unknown["T"]
    shapes = tried.call.shapes({**tried.call.sizes, **unknown})
    operands = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
    run = jax.jit(lambda operands: tried.run(operands))
    try:
        exported = jax.export.export(run)(operands)
    except JaxmemError:
        return False
    assert_close(exported.call(tried.call.operands()), run(tried.call.operands()))
    return True


def row(name: str, implementation: str) -> dict[str, bool]:
    """Return what a form of an op can do."""
    tried, operands = Tried(CALLS[name], implementation), CALLS[name].operands()
    found = {"vmap": lowers(tried.vmapped, operands)}
    found |= {n: lowers(functools.partial(of, tried), operands) for n, of in DERIVATIVES.items()}
    found["shard_map"] = implementation != "pallas" and lowers(tried.sharded, operands)
    found["export, any B and T"] = exports(tried, "BT")
    found["export, any B"] = found["export, any B and T"] or exports(tried, "B")
    return found


@functools.cache
def table() -> str:
    """Return the table of the page.

    Without the hook of the tests: a symbolic size is no `int`, which its annotations say.
    """
    checked, jaxtyping.config.jaxtyping_disable = jaxtyping.config.jaxtyping_disable, True
    try:
        return "\n".join(_rows())
    finally:
        jaxtyping.config.jaxtyping_disable = checked


def _rows() -> list[str]:
    lines = []
    for name, call in CALLS.items():
        for implementation in implementations(call.op):
            if implementation == "cudnn":
                continue
            found = row(name, implementation)
            if not lines:
                lines += [f"| op | form | {' | '.join(found)} |", "| --- " * (len(found) + 2) + "|"]
            marks = " | ".join("yes" if able else "no" for able in found.values())
            lines.append(f"| {name} | `{implementation}` | {marks} |")
    return lines


def page() -> str:
    """Return the page as it has to be: its words, with the table that is found here."""
    words = PAGE.read_text("utf-8")
    start, end = (words.index(f"<!-- {mark} -->") for mark in ("table", "end of table"))
    return f"{words[:start]}<!-- table -->\n\n{table()}\n\n{words[end:]}"


def test_the_page_says_what_is_found():
    assert page() == PAGE.read_text("utf-8"), "python -m tests.unit.ops.test_transforms"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
