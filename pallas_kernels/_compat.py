"""The single place that knows the differences between JAX 0.10.2 and 0.12.x.

It is also the only module that imports Pallas. JAX 0.11.0 deprecated the Triton backend of Pallas;
when it goes, `backend_missing` says so and every op runs its XLA form. Kernel files use the names
below, so that a move to another backend changes this file, and loads and stores, not mathematics.
"""

import contextlib
import contextvars
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, use_abstract_mesh

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu
except ImportError as error:  # the backend is announced to be removed
    pl: Any = None
    plgpu: Any = None
    _MISSING = f"jax {jax.__version__} has no Pallas Triton backend ({error})"
else:
    _MISSING = None

_TRITON_DIALECT = "jaxlib.mlir.dialects.tt"
# MLIR tries to import the Python module of a dialect whenever it meets a type of it. Triton's has
# none, and the search took a third of a kernel's lowering; what is there, if empty, is not sought.
if _MISSING is None and importlib.util.find_spec(_TRITON_DIALECT) is None:
    sys.modules.setdefault(_TRITON_DIALECT, types.ModuleType(_TRITON_DIALECT))

Precision = Literal["default", "high", "highest"]
"""Products of float32 tiles: TF32, three TF32 products (about float32), or IEEE float32."""

TRITON_WARNING = "The Pallas Triton backend is deprecated"


def backend_missing() -> str | None:
    """Say why kernels cannot be built with this JAX, or None."""
    return _MISSING


class Target(NamedTuple):
    """The GPU that kernels are compiled for."""

    kind: str
    """Marketing name, such as `NVIDIA H200`."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a GPU that has none (ROCm)."""


ANY_GPU = "NVIDIA A100 or later"
"""Stand-in for what is lowered once for every GPU: a kernel that asks which one it is raises.

JAX reads the beginning of the name, for what the oldest of them cannot do.
"""


class _AnyTarget(Target):
    __slots__ = ()

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError(
            "A kernel asks for which GPU it is lowered, and is lowered once for all of them here. "
            "Let its launch configuration tell it."
        )

    capability = kind  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


# Capabilities of the devices that may be stood in for; real ones report their own.
_STAND_INS = {
    ANY_GPU: _AnyTarget(ANY_GPU, (8, 0)),
    "NVIDIA A100": Target("NVIDIA A100", (8, 0)),
    "NVIDIA H100": Target("NVIDIA H100", (9, 0)),
    "NVIDIA H200": Target("NVIDIA H200", (9, 0)),
}
_stand_in: contextvars.ContextVar[Target | None] = contextvars.ContextVar("stand_in", default=None)


def target() -> Target | None:
    """Return the GPU that a kernel traced now is compiled for; None if the process has none."""
    return _stand_in.get() or _local_gpu()


@cache
def _local_gpu() -> Target | None:
    """Return the first GPU of this process, whichever platform is its default."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # no such platform
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return Target(device.device_kind, (int(found[1]), int(found[2])) if found else None)


def default_platform() -> str:
    """Return the platform that code traced now runs on unless its arrays say otherwise.

    That is the one of `jax.default_device`, or the first one of the process: `cpu`, `gpu`, `tpu`.
    """
    if _stand_in.get() is not None:
        return "gpu"
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def only_cpu() -> bool:
    """Return whether no other platform than a CPU can run what is traced now."""
    return target() is None and default_platform() == jax.default_backend() == "cpu"


@contextlib.contextmanager
def stand_in_gpu(kind: str = "NVIDIA H100", cores: int = 132) -> Iterator[None]:
    """Trace and lower as if a GPU of this kind were there; nothing is run.

    Raises:
      KeyError: the capability of this kind of device is not known here.
    """
    device = AbstractDevice(kind, num_cores=cores, platform="gpu")
    token = _stand_in.set(_STAND_INS[kind])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=TRITON_WARNING, category=DeprecationWarning)
            # The mesh also keeps what is traced here apart in the caches of jit.
            with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
                yield
    finally:
        _stand_in.reset(token)


def lower_for_cuda(function: Callable, *operands: Any, kind: str = "NVIDIA H100") -> Any:
    """Lower a function for CUDA on any machine; operands may be `jax.ShapeDtypeStruct`s."""
    with stand_in_gpu(kind):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))


KERNEL_CALL = "__gpu$xla.gpu.triton"
"""Target of the custom calls that hold kernels."""


def kernel_texts(lowered: Any) -> list[tuple[str, str]]:
    """Return name and text of the Triton kernels that a lowered program calls, in order.

    The text is all that the compiler is told of a kernel: grid, warps, stages and its code, without
    the places in Python files that the code came from.
    """
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    found: list[tuple[str, str]] = []

    def visit(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == (
            KERNEL_CALL
        ):
            call = {a.name: a.attr for a in op.attributes["mhlo.backend_config"]}
            with ir.Context() as context:
                dialect.register_dialect(context)
                code = ir.Module.parse(call.pop("ir").value_bytes).operation
                text = code.get_asm(enable_debug_info=False)
            head = ", ".join(f"{name} = {call[name]}" for name in sorted(call))
            found.append((call["name"].value, f"{head}\n{text}"))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def launch(
    kernel: Callable,
    *,
    name: str,
    grid: Sequence[int],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable:
    """Return the kernel as a function of arrays.

    The backend is always named by its parameters: JAX versions differ about the default one.
    """
    if pl is None or plgpu is None:
        raise NotImplementedError(_MISSING)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=tuple(grid),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )


def load(ref: Any, mask: Array | None = None, other: float = 0.0) -> Array:
    """Read a (slice of a) reference, with `other` where the mask is False.

    Write the slice as `ref.at[...]`. A masked slice may reach beyond the array.
    """
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=other)


def store(ref: Any, value: Array, mask: Array | None = None) -> None:
    """Write a (slice of a) reference, `ref.at[...]`, where the mask is True."""
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


def mm(
    a: Array,
    b: Array,
    *,
    ta: bool = False,
    tb: bool = False,
    precision: Precision = "default",
    interpret: bool = False,
) -> Array:
    """Multiply two tiles of one dtype, accumulated in float32; `ta`, `tb` transpose an operand.

    Interpreted on CPU, every precision is IEEE float32: the TF32 presets do not exist there.
    """
    dimensions = (((0,) if ta else (1,), (1,) if tb else (0,)), ((), ()))
    chosen: Any = None
    if a.dtype == jnp.float32 and not interpret:
        chosen = {
            "default": lax.DotAlgorithmPreset.TF32_TF32_F32,
            "high": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
            "highest": lax.Precision.HIGHEST,
        }[precision]
    return lax.dot_general(a, b, dimensions, precision=chosen, preferred_element_type=jnp.float32)


def make_mesh(shape: Sequence[int], names: Sequence[str], devices: Sequence[jax.Device]) -> Mesh:
    """Build a mesh whose axes are `Auto`.

    The shape is positional because its keyword changed (`axis_shapes` on 0.10, `axis_sizes` from
    0.11), and the axis types are explicit because `jax.make_mesh` defaults to `Explicit`, under
    which `shard_map` rejects arrays that were placed elsewhere.
    """
    types = (AxisType.Auto,) * len(tuple(names))
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=types, devices=tuple(devices))


def vary_like(value: Array, *operands: Any) -> Array:
    """Return the value, marked as varying over the mesh axes that the operands vary over.

    Inside `jax.shard_map` with its check of varying axes a scan refuses a carry that starts as a
    constant and becomes a function of the operands. Elsewhere this does nothing.
    """
    axes = _varying(*operands) - _varying(value)
    return lax.pcast(value, tuple(sorted(axes)), to="varying") if axes else value


def _varying(*operands: Any) -> frozenset[str]:
    """Return the manual mesh axes that arrays vary over."""
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(operands):
        found |= jax.typeof(leaf).manual_axis_type.varying
    return found
