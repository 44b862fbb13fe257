"""Attention by cuDNN, where it is the same function and has shown that it computes it.

cuDNN's attention has been wrong or absent in some combinations of its versions with JAX's, so its
numbers are looked at once per process before `auto` relies on them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from pallas_kernels._compat import target

MAX_WIDTH = 128
TOLERANCE = 2e-2
"""Relative RMS error of bfloat16 outputs and gradients; a wrong mask gives 0.1 or more."""
VERDICT_BYTES = 256
"""Of a verdict that one process sends to the others."""

Run = Callable[[Array, Array, Array], Array]


def run(
    q: Array, k: Array, v: Array, *, scale: float, window: int | None, causal: bool = True
) -> Array:
    """Call cuDNN: causal, with keys fewer than `window` places behind, or with all keys."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def unmet(
    q: Any, k: Any, v: Any, *, scale: Any, window: int | None, causal: bool = True
) -> str | None:
    """Say what a plain call lacks for cuDNN, or None."""
    if target() is None:
        return "no CUDA GPU here"
    if not isinstance(scale, float):
        return "its scale is one Python number, not an array"
    dtypes = {jnp.dtype(a.dtype).name for a in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"it takes bfloat16 or float16, not {', '.join(sorted(dtypes))}"
    widths = {k.shape[3], v.shape[3]}
    if len(widths) > 1 or any(n % 8 or n > MAX_WIDTH for n in widths):
        return f"it takes one head width, a multiple of 8 to {MAX_WIDTH}, not {sorted(widths)}"
    return probe(window is not None, causal)


@functools.cache
def probe(windowed: bool, causal: bool = True) -> str | None:
    """Return what is wrong with cuDNN on a small call, or None; looked at once per process.

    Of several processes, which must all run the same program, the first one decides.
    """
    if jax.process_count() == 1:
        return _verdict(windowed, causal)
    mine = _verdict(windowed, causal) if jax.process_index() == 0 else None
    words = np.zeros(VERDICT_BYTES, np.uint8)
    text = (mine or "").encode()[:VERDICT_BYTES]
    words[: len(text)] = np.frombuffer(text, np.uint8)
    with jax.ensure_compile_time_eval():
        theirs = multihost_utils.broadcast_one_to_all(words)
    return np.asarray(theirs).tobytes().rstrip(b"\0").decode(errors="replace") or None


def _verdict(windowed: bool, causal: bool) -> str | None:
    """Compare cuDNN with plain JAX on a small call."""
    rule = {"window": 40 if windowed else None, "causal": causal, "scale": 0.125}
    try:
        # Also inside a trace the numbers of the probe are concrete.
        with jax.ensure_compile_time_eval():
            error = _difference(
                functools.partial(run, **rule), functools.partial(_expected, **rule)
            )
    except Exception as failure:  # whatever cuDNN raises, another implementation can run
        return f"its probe failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    if error <= TOLERANCE:
        return None
    return f"its probe is off by {error:.1e} (relative RMS; {TOLERANCE:.0e} is allowed)"


def _difference(run: Run, expected: Run) -> float:
    """Return the largest relative RMS difference of outputs and gradients."""
    shapes = ((2, 128, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64), (2, 128, 4, 64))
    draw = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in shapes)

    def outputs(function: Run) -> list[np.ndarray]:
        def both(q: Array, k: Array, v: Array, grad: Array) -> tuple:
            y, pull = jax.vjp(function, q, k, v)
            return y, *pull(grad)

        return [np.asarray(a, np.float64) for a in jax.jit(both)(q, k, v, grad)]

    pairs = zip(outputs(run), outputs(expected), strict=True)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    return float(np.max(errors)) if np.all(np.isfinite(errors)) else np.inf


def _expected(
    q: Array, k: Array, v: Array, *, scale: float, window: int | None, causal: bool
) -> Array:
    share = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a.astype(jnp.float32), share, axis=2) for a in (k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q.astype(jnp.float32), k, precision="highest") * scale
    behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    seen = (behind >= 0) & (behind < (window or q.shape[1])) | (not causal)
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest").astype(q.dtype)
