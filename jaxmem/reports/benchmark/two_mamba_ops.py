"""Linear and squared attention, and the uses of softmax attention that are compared with them."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmem.ops.attention import attention, attention_with_lse
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.linear_attention import linear_attention
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.squared_attention import squared_attention
from jaxmem.reports.benchmark import baselines, exact
from jaxmem.reports.benchmark.op import Form, Op, Shape
from jaxmem.reports.benchmark.work import Pass, Work, linear_read, softmax_read, squared_read

TERMS = 80
"""Of Taylor's sum; the authors' number."""
CLAMP = 5.0
"""Largest product of the authors' gated softmax."""


def _draw(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    keys = (s["B"], s["T"], s.get("G", s["H"]), s["K"])
    values = (s["B"], s["T"], s["H"], s.get("V", s["K"]))
    return {
        "q": draw.normal(size=keys),
        "k": draw.normal(size=keys),
        "v": draw.normal(size=values),
    }


def _log_gates(draw: np.random.Generator, s: Shape) -> np.ndarray:
    # log sigmoid(3 + n): gates as models learn them, mostly open.
    return -np.logaddexp(0, -3 - draw.normal(size=(s["B"], s["T"], s["H"])))


def _draw_decaying(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    return _draw(draw, s) | {"log_decay": _log_gates(draw, s)}


def _draw_retention(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    # RetNet's decays.
    return _draw(draw, s) | {"log_decay": np.log1p(-(2.0 ** (-5 - np.arange(s["H"]))))}


def _draw_forgetting(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    return _draw(draw, s) | {"log_forget": _log_gates(draw, s)}


def _draw_gated(draw: np.random.Generator, s: Shape) -> dict[str, np.ndarray]:
    return _draw(draw, s) | {"value_gate": np.exp(_log_gates(draw, s))}


def _linear(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    *,
    implementation: Implementation,
    chunk_size: int | None = None,
) -> Array:
    return linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        implementation=implementation,
        chunk_size=chunk_size,
    ).y


def _squared(
    q: Array, k: Array, v: Array, log_decay: Array, *, implementation: Implementation
) -> Array:
    read = squared_attention(
        q, k, v, log_decay=log_decay, with_total=True, implementation=implementation
    )
    return baselines.normalised(read).astype(v.dtype)


def _forgetting(
    q: Array, k: Array, v: Array, log_forget: Array, *, implementation: Implementation
) -> Array:
    scale = q.shape[-1] ** -0.5
    return attention(q, k, v, scale=scale, log_forget=log_forget, implementation=implementation)


def _gated(
    q: Array, k: Array, v: Array, value_gate: Array, *, implementation: Implementation
) -> Array:
    y, lse = attention_with_lse(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        clamp=CLAMP,
        value_gate=value_gate,
        implementation=implementation,
    )
    total = jnp.exp(lse) / jnp.arange(1, q.shape[1] + 1)[:, None]
    return (total[..., None] * y).astype(v.dtype)


def _polynomial(q: Array, k: Array, v: Array, *, implementation: Implementation) -> Array:
    read = polynomial_attention(q, k, v, coefficients=TERMS, implementation=implementation)
    return (read.y / read.total[..., None]).astype(v.dtype)


def _linear_work(s: Shape, itemsize: int, gates: int = 0) -> Work:
    return linear_read(
        s["B"] * s["T"],
        s["H"],
        s.get("G", s["H"]),
        s["K"],
        s.get("V", s["K"]),
        itemsize=itemsize,
        gates=gates,
    )


def _decaying_work(s: Shape, itemsize: int) -> Work:
    return _linear_work(s, itemsize, gates=1)


def _squared_work(s: Shape, itemsize: int) -> Work:
    return squared_read(s["B"], s["T"], s["H"], s["K"], s["K"], itemsize=itemsize, gates=1)


def _softmax_work(s: Shape, itemsize: int) -> Work:
    tables = s["B"] * s["H"]
    elements = 4 * tables * s["T"] * s["K"]
    return softmax_read(
        s["T"], s["T"] // 2, s["K"], itemsize=itemsize, tables=tables, row_elements=elements
    )


def _gated_work(s: Shape, itemsize: int) -> Work:
    gates = 4 * s["B"] * s["T"] * s["H"]
    forward, backward = _softmax_work(s, itemsize)
    return Work(
        Pass(forward.bytes + gates, forward.flops), Pass(backward.bytes + 2 * gates, backward.flops)
    )


_WIDE = (
    {"B": 4, "T": 2048, "H": 16, "K": 128},
    {"B": 2, "T": 16384, "H": 16, "K": 128},
    {"B": 1, "T": 8192, "H": 96, "K": 128},
)
"""Shapes that flash-linear-attention is published at."""
_LINEAR_SMALL = ({"B": 2, "T": 1024, "H": 4, "K": 64},)
_SOFTMAX_SMALL = ({"B": 2, "T": 256, "H": 4, "K": 32},)
_BY_MATRIX = {"T x T matrix": baselines.linear_by_matrix}


CHUNK_SIZES = (32, 64)
"""Tokens per chunk that are compared."""


def _per_chunk_size(name: str, form: Form, **options: Any) -> dict[str, Form]:
    """Return a form in chunks of every size."""
    return {
        f"{name} of {size}": functools.partial(form, chunk_size=size, **options)
        for size in CHUNK_SIZES
    }


OPS = (
    Op(
        name="linear_attention",
        draw=_draw_decaying,
        call=_linear,
        exact=exact.linear_attention,
        work=_decaying_work,
        shapes=({"B": 8, "T": 2048, "H": 16, "K": 64}, *_WIDE),
        small=_LINEAR_SMALL,
        baselines={
            **_BY_MATRIX,
            **_per_chunk_size("chunks", _linear, implementation="xla"),
            **_per_chunk_size("plain chunks", baselines.linear_by_chunks),
        },
        float32=("log_decay",),
    ),
    Op(
        name="linear_attention",
        variant="no decay",
        draw=_draw,
        call=_linear,
        exact=exact.linear_attention,
        work=_linear_work,
        shapes=_WIDE,
        small=_LINEAR_SMALL,
        baselines=_BY_MATRIX,
    ),
    Op(
        name="linear_attention",
        variant="retention",
        draw=_draw_retention,
        call=_linear,
        exact=exact.linear_attention,
        work=_linear_work,
        shapes=_WIDE,
        small=_LINEAR_SMALL,
        baselines=_BY_MATRIX,
    ),
    Op(
        name="linear_attention",
        variant="Mamba-2",
        draw=_draw_decaying,
        call=_linear,
        exact=exact.linear_attention,
        work=_decaying_work,
        shapes=(
            {"B": 8, "T": 2048, "H": 80, "G": 1, "K": 128, "V": 64},
            {"B": 1, "T": 32768, "H": 128, "G": 1, "K": 128, "V": 64},
        ),
        small=({"B": 1, "T": 1024, "H": 8, "G": 1, "K": 128, "V": 64},),
        baselines=_BY_MATRIX,
        float32=("log_decay",),
    ),
    Op(
        name="squared_attention",
        draw=_draw_decaying,
        call=_squared,
        exact=exact.squared_attention,
        work=_squared_work,
        shapes=(
            {"B": 8, "T": 2048, "H": 16, "K": 64},
            {"B": 1, "T": 32768, "H": 16, "K": 64},
        ),
        small=({"B": 2, "T": 1024, "H": 4, "K": 32},),
        baselines={
            "all pairs": baselines.squared_by_pairs,
            **_per_chunk_size("chunks", baselines.squared_by_chunks),
        },
        float32=("log_decay",),
    ),
    Op(
        name="attention",
        variant="2Mamba-E",
        draw=_draw_forgetting,
        call=_forgetting,
        exact=exact.forgetting_attention,
        work=_gated_work,
        shapes=({"B": 8, "T": 2048, "H": 16, "K": 64},),
        small=_SOFTMAX_SMALL,
        float32=("log_forget",),
    ),
    Op(
        name="attention",
        variant="gated softmax",
        draw=_draw_gated,
        call=_gated,
        exact=exact.gated_softmax,
        work=_gated_work,
        shapes=({"B": 8, "T": 2048, "H": 16, "K": 64},),
        small=_SOFTMAX_SMALL,
        float32=("value_gate",),
    ),
    Op(
        name="polynomial_attention",
        draw=_draw,
        call=_polynomial,
        exact=exact.taylor_attention,
        work=_softmax_work,
        shapes=({"B": 2, "T": 2048, "H": 8, "K": 64},),
        small=_SOFTMAX_SMALL,
    ),
)
