"""One cell of a benchmark: first the errors against float64, then, if they are small, the times."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.reports.benchmark import timing
from jaxmem.reports.benchmark.cases import Case
from jaxmem.reports.benchmark.op import Form
from jaxmem.reports.benchmark.work import Ceilings, floor_ms

TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}
"""Largest relative RMS error that is timed; TF32 has the mantissa of float16."""
CPU_FLOAT32 = 1e-5
"""The same where float32 products are float32."""
_MEMORY = {"cpu": 2 * 2**30, "gpu": 48 * 2**30}
"""Temporary memory that a program may need here."""

Cell = dict[str, Any]


def measure_case(case: Case, ceilings: Ceilings, *, budget: float, rounds: int) -> list[Cell]:
    """Measure all implementations and baselines of a case in alternation.

    Nothing is timed that disagrees with the exact form, and nothing that needs too much memory.
    """
    forms, refused = case.forms()
    cotangent = cotangent_of(case)
    expected = exact_of(case, cotangent)
    about: Cell = {
        "op": case.op.name,
        "variant": case.op.variant,
        "shape": case.shape,
        "dtype": case.dtype,
        "small": case.small,
    }
    cells: dict[str, Cell] = {name: about | {"form": name} for name in [*forms, *refused]}
    for name, reason in refused.items():
        cells[name] |= {"status": "skipped", "reason": reason}
    ready: dict[str, Form] = {}
    for name, form in forms.items():
        cells[name] |= _check(case, form, cotangent, expected)
        if cells[name]["status"] == "ok":
            ready[name] = form
    for field, work in (("forward", case.work.forward), ("forward_backward", case.work.both)):
        # The exact form's work is what it takes, whatever an implementation does beside it.
        floor = floor_ms(work, ceilings)
        programs = {n: _program(f, field, cotangent) for n, f in ready.items()}
        operands = tuple(case.operands.values())
        for name, found in _times(programs, operands, budget=budget, rounds=rounds).items():
            cells[name][field] |= found | {"floor_ms": floor, "of_floor": floor / found["ms"]}
    return list(cells.values())


def tolerance(dtype: str) -> float:
    """Return the largest error that is timed here."""
    if dtype == "float32" and jax.default_backend() == "cpu":
        return CPU_FLOAT32
    return TOLERANCES[dtype]


def errors(found: Sequence[Any], expected: Sequence[np.ndarray], names: Sequence[str]) -> dict:
    """Return the relative RMS error of each array by name."""
    result = {}
    for name, a, b in zip(names, found, expected, strict=True):
        difference = np.asarray(a, np.float64) - b
        result[name] = float(np.linalg.norm(difference) / (np.linalg.norm(b) or 1.0))
    return result


def _program(form: Form, field: str, cotangent: jax.Array) -> Form:
    return form if field == "forward" else functools.partial(_with_gradients, form, cotangent)


def _with_gradients(form: Form, cotangent: jax.Array, *operands: jax.Array) -> tuple:
    """Return the result and the gradients of all operands, as a training step needs them."""
    result, pull = jax.vjp(form, *operands)
    return result, *pull(cotangent.astype(result.dtype))


def cotangent_of(case: Case) -> jax.Array:
    """Return the cotangent of the result by which gradients are measured."""
    shape = jax.eval_shape(case.op.exact, *case.operands.values())
    drawn = np.random.default_rng(1).normal(size=shape.shape)
    return jnp.asarray(drawn, case.dtype)


def exact_of(case: Case, cotangent: jax.Array) -> list[np.ndarray]:
    """Compute result and gradients in float64, from the operands as rounded to the dtype."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in case.operands.values()]
        run = jax.jit(functools.partial(_with_gradients, case.op.exact))
        found = run(jnp.asarray(np.asarray(cotangent, np.float64)), *wide)
        return [np.asarray(x) for x in found]


def _check(case: Case, form: Form, cotangent: jax.Array, expected: Sequence[np.ndarray]) -> Cell:
    operands = tuple(case.operands.values())
    limit = _MEMORY.get(jax.default_backend(), _MEMORY["cpu"])
    cell: Cell = {"tolerance": tolerance(case.dtype)}
    for field in ("forward", "forward_backward"):
        try:
            program = timing.compile_program(_program(form, field, cotangent), *operands)
        except jax.errors.JaxRuntimeError as error:
            # Kernels of others do not ask first whether they fit the device.
            reason = f"{field} does not compile: {str(error).splitlines()[0]}"
            return cell | {"status": "skipped", "reason": reason}
        cell[field] = {"compile_s": program.compile_s, "temp_bytes": program.temp_bytes}
        if program.temp_bytes > limit:
            needed = f"{program.temp_bytes / 2**30:.1f} GiB"
            return cell | {"status": "skipped", "reason": f"{field} needs {needed} of memory"}
    found = program.call(*operands)
    cell["errors"] = errors(found, expected, ["out", *(f"d{name}" for name in case.operands)])
    worst = max(cell["errors"].values())
    # Written so that NaN fails.
    if not worst <= cell["tolerance"]:
        reason = f"not timed: error {worst:.1e} exceeds {cell['tolerance']:.0e}"
        return cell | {"status": "incorrect", "reason": reason}
    return cell | {"status": "ok"}


def _times(
    programs: dict[str, Form], operands: tuple[jax.Array, ...], *, budget: float, rounds: int
) -> dict[str, Cell]:
    """Time by calls and, on a GPU, by calls chained on the device; `ms` is the latter there."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, program in programs.items():
        calls[name] = functools.partial(jax.jit(program), *operands)
    by_call = timing.time_calls(calls, budget=budget, rounds=rounds)
    result = {
        name: {"ms": t.median_ms, "call_ms": t.median_ms, "spread": t.spread}
        for name, t in by_call.items()
    }
    if jax.default_backend() != "gpu":
        return result
    sets = timing.operand_sets(operands)
    chains, repeats = {}, {}
    for name, program in programs.items():
        each = by_call[name].median_ms / 1e3 * len(sets)
        repeats[name] = max(1, round(budget / each))
        chains[name] = functools.partial(jax.jit(timing.chained(program, repeats[name])), sets)
    for name, t in timing.time_calls(chains, budget=budget, rounds=rounds).items():
        each = t.median_ms / (repeats[name] * len(sets))
        result[name] |= {"ms": each, "spread": t.spread}
    return result
