"""Timing of compiled programs: rounds in alternation, medians, and the ceilings of the device.

On a CPU, times are processor times of all threads together: other processes disturb them least.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmem.reports.benchmark.work import Ceilings

BUDGET = 0.02
"""Seconds that one sample takes, as many calls as that holds."""
SAMPLES = 5
"""Samples per program and round."""
ROUNDS = 3
_CACHES = 180e6
"""Bytes of operands that no cache holds: three times the L2 of a large GPU."""
_SETS = 8


class Timing(NamedTuple):
    """Time of one call."""

    median_ms: float
    spread: float
    """Largest minus smallest median of a round, relative to the median."""


class Program(NamedTuple):
    """A function compiled for its operands."""

    call: Callable[..., Any]
    compile_s: float
    temp_bytes: int
    """Memory beside operands and results."""


def compile_program(function: Callable[..., Any], *operands: Any) -> Program:
    """Compile, and time that."""
    lowered = jax.jit(function).lower(*operands)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(compiled, seconds, 0 if memory is None else int(memory.temp_size_in_bytes))


def chained(function: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    """Return a function that calls `function` on every set of operands, `repeats` times over.

    Each call waits for the one before by a dependency that costs nothing, so the time of the whole
    is device time: the host is asked once.
    """

    def run(sets: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        def once(_: Any, token: jax.Array) -> jax.Array:
            for operands in sets:
                # A barrier holds only what is used after it. All of it is, so no call and no
                # part of its result can be dropped, merged with its like, or moved out of the loop.
                operands, token = lax.optimization_barrier((operands, token))
                result = lax.optimization_barrier(function(*operands))
                for leaf in jax.tree.leaves(result):
                    token += leaf.ravel()[0].astype(jnp.float32)
            return token

        return lax.fori_loop(0, repeats, once, jnp.float32(0))

    return run


def operand_sets(operands: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
    """Return copies of the operands, enough that the caches do not hold them all."""
    size = sum(x.nbytes for x in operands)
    number = max(1, min(_SETS, math.ceil(_CACHES / size)))
    return [operands, *(jax.tree.map(jnp.copy, operands) for _ in range(number - 1))]


def time_calls(
    calls: Mapping[str, Callable[[], Any]],
    *,
    budget: float = BUDGET,
    rounds: int = ROUNDS,
) -> dict[str, Timing]:
    """Time calls in alternation: every round takes samples of each of them in turn."""
    counts = {name: _warm_up(call, budget) for name, call in calls.items()}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples = [_sample(call, counts[name]) for _ in range(SAMPLES)]
            medians[name].append(statistics.median(samples))
    return {name: _summary(found) for name, found in medians.items()}


def _summary(medians: list[float]) -> Timing:
    middle = statistics.median(medians)
    return Timing(middle * 1e3, (max(medians) - min(medians)) / middle)


def _warm_up(call: Callable[[], Any], budget: float) -> int:
    """Call until two samples agree within 2 %; return how many calls fill the budget."""
    jax.block_until_ready(call())
    before = _sample(call, 1)
    count = 1
    for _ in range(5):
        count = max(1, round(budget / before))
        now = _sample(call, count)
        if abs(now - before) <= 0.02 * now:
            break
        before = now
    return count


def _sample(call: Callable[[], Any], count: int) -> float:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    # The clock of the processor may not have moved.
    return max(clock() - start, 1e-9) / count


def measure_ceilings(dtype: Any) -> Ceilings:
    """Measure a large copy and a large matrix product."""
    on_gpu = jax.default_backend() == "gpu"
    copied = jnp.ones((4 * 2**30 if on_gpu else 64 * 2**20,), jnp.int8)
    size = 8192 if on_gpu else 1024
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    copy = jax.jit(lambda x: x + jnp.int8(1))
    product = jax.jit(lambda x: x @ x)
    times = time_calls(
        {"copy": lambda: copy(copied), "matmul": lambda: product(square)}, budget=0.1
    )
    return Ceilings(
        copy=2 * copied.nbytes / (times["copy"].median_ms / 1e3),
        matmul=2 * size**3 / (times["matmul"].median_ms / 1e3),
    )
