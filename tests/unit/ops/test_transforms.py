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
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmem.errors import JaxmemError
from jaxmem.ops import gated_scan, leaky_average_xla, weighted_average
from jaxmem.ops.dispatch import implementations, recording_choices
from pallas_kernels import _compat
from pallas_kernels._compat import Target, make_mesh
from tests.helpers.compare import GRADIENT, Budget, assert_close
from tests.helpers.off_cpu import elsewhere_only
from tests.helpers.op_calls import CALLS, Call

PAGE = Path(__file__).parents[3] / "docs" / "transforms.md"
# Second derivatives of orders of 1 in float32, by two different algorithms.
SECOND_ORDER = Budget(rtol=2e-4, atol=1e-4, rms=5e-5)

Operands = dict[str, Any]


def floats(tree: Any) -> list[jax.Array]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


class Tried:
    """A call with one implementation, as functions of its operands."""

    def __init__(self, call: Call, implementation: str):
        self.call, self.implementation = call, implementation
        # Compiled functions inside others: what several transformations read is traced once.
        self.run, self.reverse = jax.jit(self._run), jax.jit(jax.grad(self._total))

    def _run(self, operands: Operands) -> list[jax.Array]:
        """Return all outputs, with 0 for the log-sum-exp of nothing."""
        found = floats(self.call.run(**operands, implementation=self.implementation))
        return [jnp.where(y == -jnp.inf, 0.0, y) for y in found]

    def _total(self, operands: Operands) -> jax.Array:
        """Return a function of all outputs that is linear in none of them."""
        return sum(jnp.sum(jnp.sin(1.3 * y)) for y in self.run(operands))

    def forward(self, operands: Operands, direction: Operands) -> Any:
        return jax.jvp(self.run, (operands,), (direction,))

    def forward_over_reverse(self, operands: Operands, direction: Operands) -> Any:
        """Return the gradient and its tangent."""
        return jax.jvp(self.reverse, (operands,), (direction,))

    def reverse_over_reverse(self, operands: Operands, direction: Operands) -> Any:
        def along(operands: Operands) -> jax.Array:
            grad = self.reverse(operands)
            return sum(jnp.sum(grad[n] * direction[n]) for n in operands)

        return jax.grad(along)(operands)

    def reverse_over_forward(self, operands: Operands, direction: Operands) -> Any:
        def along(operands: Operands) -> jax.Array:
            return jax.jvp(self._total, (operands,), (direction,))[1]

        return jax.grad(along)(operands)

    def derivatives(self, operands: Operands, direction: Operands) -> dict[str, Any]:
        """Return outputs with their tangents, the gradient, and the latter's derivatives."""
        grad, tangent = self.forward_over_reverse(operands, direction)
        return {
            "jvp": self.forward(operands, direction),
            "grad": grad,
            "jvp of grad": tangent,
            "grad of grad": self.reverse_over_reverse(operands, direction),
        }

    def vmapped(self, operands: Operands) -> Any:
        return jax.vmap(self.run)(both_signs(operands))

    def vmapped_gradient(self, operands: Operands) -> Any:
        return jax.vmap(self.reverse)(both_signs(operands))

    def sharded(self, operands: Operands) -> Any:
        """Take gradients inside a `shard_map` with its default check, rows over two devices."""
        mesh = make_mesh((2,), ("rows",), jax.devices()[:2])
        rows = {n: axes.strip("-").startswith("B") for n, axes in self.call.axes.items()}
        split = {n: PartitionSpec("rows") if by else PartitionSpec() for n, by in rows.items()}
        return jax.shard_map(self.reverse, mesh=mesh, in_specs=(split,), out_specs=split)(operands)


def both_signs(operands: Operands) -> Operands:
    return jax.tree.map(lambda a: jnp.stack([a, -a]), operands)


def arguments(call: Call) -> tuple[Operands, Operands]:
    """Return the operands of a call, and a direction to differentiate along."""
    operands = call.operands()
    waves = {n: np.cos(np.arange(a.size)).reshape(a.shape) for n, a in operands.items()}
    return operands, {n: np.float32(wave) for n, wave in waves.items()}


@functools.cache
def tried(name: str, implementation: str) -> Tried:
    return Tried(CALLS[name], implementation)


@functools.cache
def derivatives(name: str, implementation: str) -> dict[str, Any]:
    """Return all derivatives of a call, computed by one program."""
    this = tried(name, implementation)
    return jax.jit(this.derivatives)(*arguments(this.call))


@pytest.mark.parametrize("name", CALLS)
def test_all_derivatives_of_the_xla_form_are_those_of_the_reference(name: str):
    budget = GRADIENT if name.startswith(("linear", "squared")) else SECOND_ORDER
    found, expected = (derivatives(name, form) for form in ("xla", "reference"))
    assert_close(found, expected, budget)
    both = (found[mode] for mode in ("jvp of grad", "grad of grad"))
    assert_close(*both, budget)  # a Hessian is symmetric


SCANS: dict[str, dict[str, Any]] = {
    "gated_scan": {},
    "leaky_average": {"chunk_size": 3},  # two chunks
    "weighted_average": {},
}


@pytest.mark.parametrize("name", SCANS)
def test_all_derivatives_of_scans_off_the_cpu_are_those_of_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Trees and chunks; reverse over forward too, which the reference leaves to JAX alone."""
    elsewhere_only(monkeypatch, gated_scan, leaky_average_xla, weighted_average)
    call = CALLS[name]
    this = Tried(call._replace(run=functools.partial(call.run, **SCANS[name])), "xla")

    @jax.jit
    def every(*given: Operands) -> Any:
        return this.derivatives(*given), this.reverse_over_forward(*given)

    found, other = every(*arguments(call))
    assert_close(found, derivatives(name, "reference"), GRADIENT)
    for mode in ("jvp of grad", "grad of grad"):
        assert_close(other, found[mode], GRADIENT)


# With a state squared attention is a recurrence, which has no kernel.
KERNELS = [n for n, c in CALLS.items() if "pallas" in implementations(c.op) and "state" not in n]


@pytest.mark.parametrize("name", KERNELS)
def test_every_op_runs_on_the_cpu_of_a_process_with_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    (outputs, _), grad = (derivatives(name, "xla")[mode] for mode in ("jvp", "grad"))
    monkeypatch.setattr(_compat, "_local_gpu", lambda: Target("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    this = Tried(CALLS[name], "auto")
    with recording_choices() as choices:
        found = jax.jit(lambda o: (this.run(o), this.reverse(o)))(this.call.operands())
    assert {(c.implementation, c.elsewhere) for c in choices} == {("pallas", "xla")}
    assert_close(found, (outputs, grad), GRADIENT)


def lowers(run: Callable[..., Any], *operands: Any) -> bool:
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


def exports(name: str, implementation: str, axes: str) -> bool:
    """Return whether a call is exported with axes of unknown size; it then has to compute right."""
    this = tried(name, implementation)
    unknown = dict(zip(axes, jax.export.symbolic_shape(", ".join(axes.lower())), strict=True))
    if "T" in unknown:
        unknown["S"] = unknown["T"]
    shapes = this.call.shapes({**this.call.sizes, **unknown})
    operands = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
    try:
        exported = jax.export.export(this.run)(operands)
    except JaxmemError:
        return False
    outputs, _ = derivatives(name, implementation)["jvp"]
    assert_close(exported.call(this.call.operands()), outputs)
    return True


def row(name: str, implementation: str) -> dict[str, bool]:
    """Return what a form of an op can do."""
    able = of_kernel if implementation == "pallas" else of_plain
    found = able(name, implementation)
    found["export, any B and T"] = exports(name, implementation, "BT")
    found["export, any B"] = found["export, any B and T"] or exports(name, implementation, "B")
    return found


def of_plain(name: str, implementation: str) -> dict[str, bool]:
    """Return what plain JAX can do: all derivatives, for one program computes them."""
    this = tried(name, implementation)
    operands = this.call.operands()
    found = {"vmap": lowers(this.vmapped, operands)}
    found |= dict.fromkeys(derivatives(name, implementation), True)
    return {**found, "shard_map": lowers(this.sharded, operands)}


def of_kernel(name: str, implementation: str) -> dict[str, bool]:
    """Return what a kernel can do; nothing inside a `shard_map` with its default check."""
    this = tried(name, implementation)
    given = arguments(this.call)
    both = lowers(this.vmapped_gradient, given[0])  # less to lower than each of the two
    return {
        "vmap": both or lowers(this.vmapped, given[0]),
        "jvp": lowers(this.forward, *given),
        "grad": both or lowers(this.reverse, given[0]),
        "jvp of grad": lowers(this.forward_over_reverse, *given),
        "grad of grad": lowers(this.reverse_over_reverse, *given),
        "shard_map": False,
    }


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
