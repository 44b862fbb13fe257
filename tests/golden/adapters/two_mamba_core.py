"""Golden files of 2Mamba2Furious's kernels: weighted sums of values without a layer around."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.ops.attention import attention, attention_with_lse
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.linear_attention import LinearOutput, init_linear_state, linear_attention
from jaxmem.ops.squared_attention import (
    SquaredOutput,
    feature_count,
    squared_attention,
    squared_features,
)
from tests.golden.adapters import Arrays, Golden, cast
from tests.golden.adapters.common import Values, keyed, with_gradients

SYSTEM = "two_mamba"
FIRST = 4
"""Tokens whose features the files have."""


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file is of a kernel."""
    return str(meta.get("group", "")).startswith(("kernel core", "edge"))


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file, per implementation."""
    # Kernels know no float64.
    forms: list[Implementation] = ["reference", "xla"]
    forms += [] if dtype == np.float64 else ["pallas"]
    if golden.meta["group"].startswith("edge"):
        return [keyed(_edge(form, golden.inputs(dtype))) for form in forms]
    if "formula" in golden.meta:
        return [_results(golden, partial(_gated, form), dtype) for form in forms]
    if golden.meta["power"] == "exp":
        return [_results(golden, partial(_exponential, form, golden.meta), dtype) for form in forms]
    # With features (q·k)² is a sum with signs, which in float32 has few digits where it is small.
    runs = [(form, True) for form in ("reference", "xla")] if dtype == np.float64 else []
    runs += [(form, False) for form in forms[1:]]
    return [
        _results(golden, partial(_power, form, stateful, golden.meta), dtype)
        for form, stateful in runs
    ]


Forward = Callable[[Values], Values]


def _results(golden: Golden, forward: Forward, dtype: np.dtype) -> Arrays:
    def run(params: Values, inputs: Values) -> Values:
        return forward(inputs)

    cotangents = cast(golden.group("cotangent"), dtype)
    outputs, _, grads = jax.jit(with_gradients(run, cotangents))({}, golden.inputs(dtype))
    if "log_decay" in grads:
        each = grads["log_decay"]
        after = jnp.pad(each[..., 1:], ((0, 0), (0, 0), (0, 1)))
        grads = grads | {"log_decay_cumsum": each - after}
    return keyed(outputs, grads)


def _tokens_first(inputs: Values) -> dict[str, jax.Array]:
    """Bring (B, H, T, ...) to (B, T, H, ...)."""
    return {name: jnp.swapaxes(a, 1, 2) for name, a in inputs.items()}


def _heads_first(outputs: Values) -> Values:
    return {name: jnp.swapaxes(a, 1, 2) for name, a in outputs.items()}


def _exponential(form: Implementation, meta: Mapping[str, Any], inputs: Values) -> Values:
    """Return softmax weights with decay, normalised or not."""
    a = _tokens_first(inputs)
    options = {"scale": a["q"].shape[-1] ** -0.5, "log_forget": a.get("log_decay")}
    y, log_sum = attention_with_lse(a["q"], a["k"], a["v"], implementation=form, **options)
    if meta["norm"] == "none":
        return _heads_first({"o": y * jnp.exp(log_sum)[..., None]})
    alone = attention(a["q"], a["k"], a["v"], implementation=form, **options)
    sums = {"den": jnp.exp(log_sum), "lse2": log_sum / math.log(2.0)}
    return _heads_first({"o": alone} | sums)


def _gated(form: Implementation, inputs: Values) -> Values:
    """Return gated sums of clamped exponentials, without a denominator."""
    a = _tokens_first(inputs)
    options = {"scale": a["q"].shape[-1] ** -0.5, "clamp": 5.0}
    options["value_gate"] = a["in_gate"][..., 0]
    y, log_sum = attention_with_lse(a["q"], a["k"], a["v"], implementation=form, **options)
    return _heads_first({"o": a["out_gate"] * y * jnp.exp(log_sum)[..., None]})


def _power(form: Implementation, stateful: bool, meta: Mapping[str, Any], inputs: Values) -> Values:
    """Return powers of products with decay; with a state, that after the last token too."""
    a = _tokens_first(inputs)
    q, k = a["q"], a["k"] / math.sqrt(a["k"].shape[-1])
    if meta.get("relu_qk"):
        q, k = jax.nn.relu(q), jax.nn.relu(k)
    squared = meta["power"] == "2"
    read = _read(form, stateful, squared, q, k, a["v"], a.get("log_decay"))
    normed = meta["norm"] != "none"
    y = _shares(read) if normed else read.y
    outputs = {"o": y}
    if normed:
        outputs |= {"den": read.total, "lse2": jnp.log2(read.total)}
    found = _heads_first(outputs)
    # The forms without a state are asked for outputs only: theirs are those of the chunked form.
    state = read.state
    if state is None:
        state = _read("xla", True, squared, q, k, a["v"], a.get("log_decay")).state
    found["state_num_final"], found["state_den_final"] = state
    if squared:
        found["phi_q_first4"] = squared_features(jnp.swapaxes(q[:, :FIRST], 1, 2))
        found["phi_k_first4"] = squared_features(jnp.swapaxes(k[:, :FIRST], 1, 2))
    return found


def _read(
    form: Implementation,
    stateful: bool,
    squared: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
) -> LinearOutput | SquaredOutput:
    op = squared_attention if squared else linear_attention
    state = None
    if stateful:
        features = feature_count(q.shape[-1]) if squared else q.shape[-1]
        shape = (v.shape[0], v.shape[2], features, v.shape[3])
        state = init_linear_state(*shape, with_total=True, dtype=q.dtype)
    options = {"log_decay": log_decay, "with_total": True, "initial_state": state, "scale": 1.0}
    return op(q, k, v, implementation=form, chunk_size=8, **options)


def _shares(read: LinearOutput | SquaredOutput) -> jax.Array:
    """Return values weighed by shares, 0 where all weights are 0."""
    total = read.total[..., None]
    return jnp.where(total == 0.0, 0.0, read.y / jnp.where(total == 0.0, 1.0, total))


def _edge(form: Implementation, inputs: Values) -> Values:
    """Return rows without any weight as ours (0), and as upstream's path without kernels."""
    a = _tokens_first(inputs)
    options = {"with_total": True, "implementation": form}
    read = linear_attention(a["q"], a["k"], a["v"], **options)
    empty = (read.total == 0.0)[..., None]
    upstream = jnp.where(empty, jnp.cumsum(a["v"], axis=1), _shares(read))
    outputs = {"o_kernel_path": _shares(read), "o_reference_path": upstream, "den": read.total}
    return _heads_first(outputs)
