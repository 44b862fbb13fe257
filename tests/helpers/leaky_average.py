"""Leaky averages in float64, by their closed form and by plain loops, and inputs for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.ops.leaky_average import LeakyOutput, LeakyState, leaky_average

LENGTH, CHUNK = 37, 16
LAYOUTS = {
    "reset at the edge": [1] * 16 + [2] * 21,
    "resets around the edge": [5] * 15 + [2] * 2 + [5] * 20,
    "padding before and after": [0] * 3 + [1] * 20 + [2] * 8 + [0] * 6,
    "padding across the edge": [1] * 13 + [0] * 6 + [1] * 5 + [0] * 2 + [2] * 11,
    "an empty chunk": [1] * 16 + [0] * 16 + [3] * 5,
    "only padding": [0] * 37,
}
IDS = np.array(list(LAYOUTS.values()), np.int32)


class Direct(NamedTuple):
    """What the closed form gives, float64."""

    y: np.ndarray
    total: np.ndarray
    weight: np.ndarray


def direct(
    x: np.ndarray,
    rate: np.ndarray,
    start: np.ndarray,
    start_weight: np.ndarray,
    *,
    scaling: str = "sum",
    ids: np.ndarray | None = None,
    initial: np.ndarray | None = None,
) -> Direct:
    """Sum exp(-rate (t-i)) x_i over the real tokens of t's document, for every t anew: O(T^2)."""
    x, rate, start, start_weight = (
        np.asarray(a, np.float64) for a in (x, rate, start, start_weight)
    )
    y, total, weight = np.zeros_like(x), start.copy(), start_weight.copy()
    for row in range(x.shape[0]):
        document = None if initial is None else initial[row]
        history: float = 0.0  # decayed steps from the initial state on; infinite after a reset
        seen: list[int] = []
        for t in range(x.shape[1]):
            name = 1 if ids is None else ids[row, t]
            if name == 0:
                continue
            if document not in (None, name):
                history, seen = np.inf, []
            document = name
            seen.append(t)
            age = np.arange(len(seen))[::-1]
            decay = np.exp(-rate * age[:, None])  # [I H]
            # Not exp(-rate * inf): 0 * inf is NaN.
            left = np.exp(-rate * len(seen)) if history == 0.0 else np.zeros_like(rate)
            total[row] = np.einsum("ih,ihk->hk", decay, x[row, seen]) + left[:, None] * start[row]
            weight[row] = (decay.sum(0) + left * start_weight[row, :, 0])[:, None]
            factor = {
                "sum": np.ones_like(rate)[:, None],
                "scaled": -np.expm1(-rate)[:, None],
                "normalised": 1 / weight[row],
            }[scaling]
            y[row, t] = factor * total[row]
    return Direct(y, total, weight)


class DirectGradients(NamedTuple):
    """Derivatives of Σ g y + Σ g_final total by x, rate and start, float64."""

    x: np.ndarray
    rate: np.ndarray
    start: np.ndarray


def direct_gradients(
    x: np.ndarray,
    rate: np.ndarray,
    start: np.ndarray,
    g: np.ndarray,
    g_final: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    initial: np.ndarray | None = None,
) -> DirectGradients:
    """Walk back over the real tokens of each row of un-normalised sums, as in the definition."""
    sums = direct(x, rate, start, start[..., :1], ids=ids, initial=initial).y
    x, rate, start, g, g_final = (np.asarray(a, np.float64) for a in (x, rate, start, g, g_final))
    dx, drate, dstart = np.zeros_like(x), np.zeros_like(rate), np.zeros_like(start)
    decay = np.exp(-rate)[:, None]
    for row in range(x.shape[0]):
        names = np.ones(x.shape[1], int) if ids is None else ids[row]
        real = np.flatnonzero(names)
        first = names[real[0]] if initial is None and len(real) else 0
        documents = [first if initial is None else initial[row], *names[real]]
        handed = g_final[row]
        for n, t in reversed(list(enumerate(real))):
            dx[row, t] = g[row, t] + handed
            continues = documents[n + 1] == documents[n]
            handed = decay * dx[row, t] if continues else np.zeros_like(handed)
            drate -= np.sum(handed * (sums[row, real[n - 1]] if n else start[row]), axis=1)
        dstart[row] = handed
    return DirectGradients(dx, drate, dstart)


class Documents(NamedTuple):
    """Which document each token is of, and which the state is of."""

    ids: np.ndarray
    initial: np.ndarray


def first_documents(ids: np.ndarray) -> np.ndarray:
    """Return the first document of each row, which a state is of unless a call says otherwise."""
    return np.array([next((i for i in row if i), 0) for row in ids], np.int32)


def documents_at(cut: int, initial: np.ndarray) -> tuple[Documents, Documents]:
    """Return the tokens of `IDS` before a cut and after it; the others count as padding."""
    before = np.arange(IDS.shape[1]) < cut
    rows = zip(IDS, initial, strict=True)
    known = [next((i for i in row[:cut][::-1] if i), first) for row, first in rows]
    early = Documents(np.where(before, IDS, 0), initial)
    return early, Documents(np.where(before, 0, IDS), np.array(known, np.int32))


def exact(
    x: np.ndarray,
    rate: np.ndarray,
    state: LeakyState,
    weights: LeakyOutput,
    *,
    scaling: str = "sum",
    documents: Documents | None = None,
) -> tuple[LeakyOutput, tuple[np.ndarray, np.ndarray, LeakyState]]:
    """Return outputs and the gradients of their weighted sum by x, rate and state, float64."""
    ids, initial = documents or (np.ones(x.shape[:2], int), None)
    packed: dict[str, Any] = {"ids": ids, "initial": initial}
    real = (np.asarray(ids) != 0)[:, :, None, None]
    rate = np.minimum(rate, 1e30).astype(np.float64)  # 0 * inf would be NaN
    g, after = np.where(real, weights.y, 0.0), weights.state
    total = np.asarray(state.total, np.float64)
    sums = direct(x, rate, total, total[..., :1], **packed)
    if scaling != "normalised":
        factor = np.ones_like(rate) if scaling == "sum" else -np.expm1(-rate)
        slope = np.zeros_like(rate) if scaling == "sum" else np.exp(-rate)
        dx, drate, dtotal = direct_gradients(
            x, rate, total, factor[:, None] * g, after.total, **packed
        )
        drate = drate + slope * np.einsum("bthk,bthk->h", g, sums.y)
        out = LeakyOutput(factor[:, None] * sums.y, LeakyState(sums.total, None))
        return out, (dx, drate, LeakyState(dtotal, None))
    ones, start = np.ones((*x.shape[:3], 1)), np.asarray(state.weight, np.float64)
    counts = direct(ones, rate, start, start, **packed)
    share = np.where(real, 1 / np.where(real, counts.y, 1.0), 0.0)
    y = share * sums.y
    dx, drate, dtotal = direct_gradients(x, rate, total, share * g, after.total, **packed)
    by_count = -share * np.sum(g * y, axis=3, keepdims=True)
    _, drate_too, dweight = direct_gradients(ones, rate, start, by_count, after.weight, **packed)
    out = LeakyOutput(y, LeakyState(sums.total, counts.total))
    return out, (dx, drate + drate_too, LeakyState(dtotal, dweight))


def with_gradients(**options: Any) -> Callable[..., Any]:
    """Compile outputs, and gradients of their weighted sum by x, rate and state.

    The documents, which may be None, and the weights are data too.
    """

    def run(x: Any, rate: Any, state: Any, documents: Any, weights: Any) -> Any:
        ids, initial = documents or (None, None)

        def call(x: jax.Array, rate: jax.Array, state: LeakyState) -> LeakyOutput:
            packed = {"segment_ids": ids, "initial_segment": initial}
            return leaky_average(x, rate, initial_state=state, **packed, **options)

        out, pull = jax.vjp(call, x, rate, state)
        return out, pull(jax.tree.map(lambda g, a: g.astype(a.dtype), weights, out))

    return jax.jit(run)


def inputs(batch: int, length: int, heads: int = 3, width: int = 2) -> tuple[np.ndarray, ...]:
    """Return x and the total and weight of a state, as float32."""
    draw = np.random.default_rng(length + 100 * batch)
    x = draw.normal(size=(batch, length, heads, width))
    start = draw.normal(size=(batch, heads, width))
    weight = draw.uniform(1, 2, size=(batch, heads, 1))
    return tuple(a.astype(np.float32) for a in (x, start, weight))


def state_of(total: Any, weight: Any, scaling: str) -> LeakyState:
    return LeakyState(total, weight if scaling == "normalised" else None)


def waves(array: Any) -> np.ndarray:
    """Weigh the entries of an array differently, so that no error cancels in the sum."""
    return np.cos(np.arange(array.size)).reshape(array.shape).astype(np.float32)


def weights_of(x: np.ndarray, state: LeakyState) -> LeakyOutput:
    """Weigh all outputs of a call."""
    return jax.tree.map(waves, LeakyOutput(x, state))
