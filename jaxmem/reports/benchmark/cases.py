"""The ops at the shapes they are measured at: operands, implementations, baselines, exact form."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.errors import unknown_name
from jaxmem.ops import dispatch
from jaxmem.ops.attention import attention
from jaxmem.ops.gated_scan import gated_scan
from jaxmem.ops.leaky_average import leaky_average
from jaxmem.ops.persistent_read import persistent_read
from jaxmem.ops.weighted_average import weighted_average
from jaxmem.reports.benchmark import baselines, exact, two_mamba_ops
from jaxmem.reports.benchmark.op import Form, Op, Shape
from jaxmem.reports.benchmark.work import Work, recurrence, softmax_read


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at a shape and a dtype."""

    op: Op
    shape: Shape
    dtype: str
    small: bool
    """Whether the shape is one for a CPU."""

    @functools.cached_property
    def operands(self) -> dict[str, jax.Array]:
        """Operands by name."""
        drawn = self.op.draw(np.random.default_rng(0), self.shape)
        return {
            name: jnp.asarray(x, jnp.float32 if self._stays(name, x) else self.dtype)
            for name, x in drawn.items()
        }

    def _stays(self, name: str, x: np.ndarray) -> bool:
        return x.ndim == 1 or name in self.op.float32

    @property
    def work(self) -> Work:
        """Least work."""
        return self.op.work(self.shape, jnp.dtype(self.dtype).itemsize)

    def forms(self) -> tuple[dict[str, Form], dict[str, str]]:
        """Return what can be measured by name, and why the rest cannot."""
        names = self.op.implementations
        if names is None:
            names = dispatch.implementations(self.op.name)
        forms: dict[str, Form] = {
            name: functools.partial(self.op.call, implementation=name) for name in names
        }
        forms |= {**self.op.baselines, **self.op.gpu_baselines}
        refused = {name: why for name, form in forms.items() if (why := self._refusal(name, form))}
        return {name: form for name, form in forms.items() if name not in refused}, refused

    def _refusal(self, name: str, form: Form) -> str | None:
        """Ask the form itself, by tracing a call: it knows best what it hands to its kernels."""
        on_gpu_only = (*dispatch.KERNELS, *self.op.gpu_baselines)
        if name in on_gpu_only and jax.default_backend() == "cpu":
            note = "; interpreted kernels are not timed" if name == "pallas" else ""
            return f"no GPU here{note}"
        refusals = (ImportError, ValueError) if name in self.op.gpu_baselines else ()
        try:
            jax.eval_shape(form, *self.operands.values())
        except (dispatch.KernelUnsupported, *refusals) as error:
            return str(error)
        return None


def find_op(name: str, variant: str = "") -> Op:
    """Return a use of an op by names, its main one unless another is asked for.

    Raises:
      UnknownName: there is no such op, or no such use of it.
    """
    uses = {op.variant: op for op in variants(name)}
    if variant not in uses:
        raise unknown_name(f"variant of {name}", variant, uses)
    return uses[variant]


def variants(name: str) -> list[Op]:
    """Return all uses of an op.

    Raises:
      UnknownName: there is no such op.
    """
    found = [op for op in OPS if op.name == name]
    if not found:
        raise unknown_name("op", name, dict.fromkeys(op.name for op in OPS))
    return found


def main_uses() -> list[Op]:
    """Return every op once, in its main use."""
    return [op for op in OPS if not op.variant]


def suite(dtype: str, *, small: bool, ops: Iterable[Op] | None = None) -> list[Case]:
    """Return ops at their shapes, all of them by default."""
    return [
        Case(op, shape, dtype, small)
        for op in (OPS if ops is None else ops)
        for shape in (op.small if small else op.shapes)
    ]


def at_lengths(op: Op, lengths: Iterable[int], dtype: str, *, small: bool) -> list[Case]:
    """Return an op at rows of these lengths, as many rows as keep the number of tokens."""
    first = (op.small if small else op.shapes)[0]
    tokens = first["B"] * first["T"]
    return [
        Case(op, first | {"B": max(1, tokens // length), "T": length}, dtype, small)
        for length in lengths
    ]


def _draw_leaky(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    # The start of the rates in the paper's models.
    rate = np.linspace(0.5, 5.0, s["H"]) if s["H"] > 1 else np.array([0.5])
    return {"x": draw.normal(size=(s["B"], s["T"], s["H"], s["K"])), "rate": rate}


def _draw_gated(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    size = (s["B"], s["T"], s["D"])
    # log sigmoid(3 + n): gates as models learn them, mostly open.
    return {"x": draw.normal(size=size), "log_decay": -np.logaddexp(0, -3 - draw.normal(size=size))}


def _draw_weighted(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    per_head = (s["B"], s["T"], s["H"], 1)
    return {
        "values": draw.normal(size=(*per_head[:3], s["V"])),
        "log_weight": draw.normal(size=per_head),
        "log_decay": -np.logaddexp(0, -3 - draw.normal(size=per_head)),
    }


def _draw_attention(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    return {name: draw.normal(size=(s["B"], s["T"], s["H"], s["K"])) for name in ("q", "k", "v")}


def _draw_persistent(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    table = (s["R"], s["H"], s["P"], s["K"])
    return {
        "q": draw.normal(size=(s["B"], s["T"], s["H"], s["K"])),
        "keys": draw.normal(size=table),
        "values": draw.normal(size=table),
        "scale": np.full(s["H"], s["K"] ** -0.5),
    }


def _elements(s: Shape) -> int:
    return s["B"] * s["T"] * s["H"] * s["K"]


def _leaky_work(s: Shape, itemsize: int) -> Work:
    return recurrence(_elements(s), itemsize, gates=0)


def _gated_work(s: Shape, itemsize: int) -> Work:
    elements = s["B"] * s["T"] * s["D"]
    return recurrence(elements, itemsize, gates=elements)


def _weighted_work(s: Shape, itemsize: int) -> Work:
    tokens = s["B"] * s["T"] * s["H"]
    return recurrence(tokens * s["V"], itemsize, gates=2 * tokens)


def _attention_work(s: Shape, itemsize: int) -> Work:
    # Causal: a query sees half of the keys on average.
    return softmax_read(
        s["T"],
        s["T"] // 2,
        s["K"],
        itemsize=itemsize,
        tables=s["B"] * s["H"],
        row_elements=4 * _elements(s),
    )


def _persistent_work(s: Shape, itemsize: int) -> Work:
    stored = 2 * s["R"] * s["H"] * s["P"] * s["K"]
    return softmax_read(
        s["B"] * s["T"],
        s["P"],
        s["K"],
        itemsize=itemsize,
        tables=s["R"] * s["H"],
        row_elements=2 * _elements(s) + stored,
    )


OPS = (
    Op(
        name="leaky_average",
        draw=_draw_leaky,
        call=lambda x, rate, *, implementation: (
            leaky_average(x, rate, implementation=implementation).y
        ),
        exact=exact.leaky_average,
        work=_leaky_work,
        shapes=({"B": 8, "T": 2048, "H": 16, "K": 64}, {"B": 1, "T": 32768, "H": 16, "K": 64}),
        small=({"B": 2, "T": 1024, "H": 4, "K": 32}, {"B": 1, "T": 2048, "H": 4, "K": 32}),
        baselines={
            "associative_scan": baselines.leaky_average_by_pairs,
            "T x T matrix": baselines.leaky_average_by_matrix,
        },
    ),
    Op(
        name="gated_scan",
        draw=_draw_gated,
        call=lambda x, log_decay, *, implementation: (
            gated_scan(x, log_decay, implementation=implementation).h
        ),
        exact=exact.gated_scan,
        work=_gated_work,
        shapes=({"B": 8, "T": 2048, "D": 1024}, {"B": 1, "T": 32768, "D": 1024}),
        small=({"B": 2, "T": 1024, "D": 128},),
        baselines={"associative_scan": baselines.gated_scan_by_pairs},
    ),
    Op(
        name="weighted_average",
        draw=_draw_weighted,
        call=lambda values, log_weight, log_decay, *, implementation: (
            weighted_average(values, log_weight, log_decay, implementation=implementation).y
        ),
        exact=exact.weighted_average,
        work=_weighted_work,
        shapes=({"B": 8, "T": 2048, "H": 16, "V": 64}, {"B": 1, "T": 32768, "H": 16, "V": 64}),
        small=({"B": 2, "T": 1024, "H": 4, "V": 32},),
        baselines={"associative_scan": baselines.weighted_average_by_pairs},
    ),
    Op(
        name="attention",
        draw=_draw_attention,
        call=lambda q, k, v, *, implementation: attention(
            q, k, v, scale=q.shape[-1] ** -0.5, implementation=implementation
        ),
        exact=exact.causal_attention,
        work=_attention_work,
        shapes=(
            {"B": 8, "T": 2048, "H": 16, "K": 64},
            {"B": 1, "T": 32768, "H": 16, "K": 64},
            {"B": 8, "T": 2048, "H": 16, "K": 128},
        ),
        small=({"B": 2, "T": 256, "H": 4, "K": 32},),
        baselines={"jax.nn xla": baselines.jax_attention},
        gpu_baselines={"jax pallas mha": baselines.jax_kernel_attention},
    ),
    Op(
        name="persistent_read",
        draw=_draw_persistent,
        call=lambda q, keys, values, scale, *, implementation: persistent_read(
            q, keys, values, scale=scale, implementation=implementation
        ),
        exact=exact.persistent_read,
        work=_persistent_work,
        shapes=(
            {"B": 8, "T": 512, "H": 12, "K": 64, "P": 2688, "R": 1},
            {"B": 1, "T": 1024, "H": 16, "K": 96, "P": 5376, "R": 1},
        ),
        small=({"B": 12, "T": 64, "H": 4, "K": 32, "P": 448, "R": 1},),
    ),
    *two_mamba_ops.OPS,
)
