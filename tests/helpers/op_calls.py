"""One call or two of every op, with everything that can be differentiated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmem

SIZES = {"B": 2, "T": 17, "S": 17, "H": 2, "K": 4, "V": 3, "D": 6, "R": 2, "P": 7, "N": 3}
LONG = {**SIZES, "T": 150, "S": 150, "H": 1}


class Call(NamedTuple):
    """A call of an op as a function of named arrays."""

    op: str
    run: Callable[..., Any]
    axes: dict[str, str]
    """Axes of each floating-point operand, such as `B T H K`; a minus makes it negative."""
    sizes: dict[str, int] = SIZES

    def shapes(self, sizes: dict[str, Any]) -> dict[str, tuple]:
        """Return the shape of each operand."""
        return {
            n: tuple(sizes[a] for a in axes.strip("-").split()) for n, axes in self.axes.items()
        }

    def operands(self) -> dict[str, jax.Array]:
        """Return operands of order 1."""
        draw = np.random.default_rng(3)
        made = {}
        for name, shape in self.shapes(self.sizes).items():
            values = draw.normal(size=shape)
            negative = self.axes[name].startswith("-")
            made[name] = jnp.asarray(np.float32(-np.abs(values) if negative else values))
        return made


def _packed(x: jax.Array) -> jax.Array:
    """Return documents of rows: of two, the first with padding before and inside, then padding.

    Each row begins a token later, so that the first has 0 1 1 0 1 2 2 2 0 0 0 and so on.
    """
    place = jnp.arange(x.shape[0])[:, None] + jnp.arange(x.shape[1])
    padding = (place == 0) | (place == 3) | (place > 7)
    return jnp.where(padding, 0, jnp.where(place < 5, 1, 2))


def _leaky(x: Any, rate: Any, total: Any, weight: Any, **options: Any) -> Any:
    state = jaxmem.LeakyState(total, weight**2)
    return jaxmem.leaky_average(
        x, rate**2, scaling="normalised", initial_state=state, segment_ids=_packed(x), **options
    )


def _gated(x: Any, log_decay: Any, state: Any, **options: Any) -> Any:
    return jaxmem.gated_scan(x, log_decay, initial_state=state, segment_ids=_packed(x), **options)


def _weighted(values: Any, weight: Any, decay: Any, bonus: Any, mean: Any, **options: Any) -> Any:
    state = jaxmem.WeightedState(mean, mean[..., :1])
    options = {"initial_state": state, "segment_ids": _packed(values), **options}
    return jaxmem.weighted_average(values, weight, decay, bonus=bonus, **options)


def _linear(q: Any, k: Any, v: Any, decay: Any, memory: Any, total: Any, **options: Any) -> Any:
    state = jaxmem.LinearState(memory, total)
    options = {"initial_state": state, "with_total": True, "chunk_size": 2, **options}
    return jaxmem.linear_attention(q, k, v, log_decay=decay, segment_ids=_packed(q), **options)


def _squared(q: Any, k: Any, v: Any, decay: Any, **options: Any) -> Any:
    options = {"log_decay": decay, "with_total": True, "segment_ids": _packed(q), **options}
    read = jaxmem.squared_attention(q, k, v, **options)
    return read.y, read.total


def _squared_state(q: Any, k: Any, v: Any, decay: Any, memory: Any, **options: Any) -> Any:
    options = {"log_decay": decay, "chunk_size": 2, **options}
    state = jaxmem.LinearState(memory, None)
    read = jaxmem.squared_attention(q, k, v, initial_state=state, **options)
    return read.y, read.state


def _attention(q: Any, k: Any, v: Any, scale: Any, forget: Any, gate: Any, **options: Any) -> Any:
    dropout = jaxmem.Dropout(0.2, jax.random.key(0))
    options = {"log_forget": forget, "value_gate": gate, "dropout": dropout, **options}
    read = jaxmem.attention_with_lse
    return read(q, k, v, scale=scale, clamp=1.5, segment_ids=_packed(q), **options)


_QKV = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
CALLS = {
    "attention": Call(
        "attention",
        _attention,
        {**_QKV, "scale": "H", "forget": "-B T H", "gate": "B T H"},
    ),
    "attention, long rows": Call(
        "attention",
        functools.partial(jaxmem.attention, window=100),
        _QKV,
        LONG,
    ),
    "attention, all keys": Call(
        "attention", functools.partial(jaxmem.attention, causal=False), {**_QKV, "scale": "H"}
    ),
    "gated_scan": Call("gated_scan", _gated, {"x": "B T D", "log_decay": "-B T D", "state": "B D"}),
    "leaky_average": Call(
        "leaky_average",
        _leaky,
        {"x": "B T H K", "rate": "H", "total": "B H K", "weight": "B H 1"},
        {**SIZES, "1": 1},
    ),
    "linear_attention": Call(
        "linear_attention",
        _linear,
        {**_QKV, "decay": "-B T H", "memory": "B H K V", "total": "B H K"},
    ),
    "persistent_read": Call(
        "persistent_read",
        jaxmem.persistent_read,
        {"q": "B T H K", "keys": "R H P K", "values": "R H P V", "scale": "H"},
    ),
    "polynomial_attention": Call(
        "polynomial_attention",
        functools.partial(jaxmem.polynomial_attention, clamp=1.5),
        {**_QKV, "coefficients": "N H", "log_forget": "-B T H"},
    ),
    "squared_attention": Call("squared_attention", _squared, {**_QKV, "decay": "-B T H"}),
    "squared_attention, state": Call(
        "squared_attention",
        _squared_state,
        {**_QKV, "decay": "-B T H", "memory": "B H F V"},
        {**SIZES, "F": 10},
    ),
    "weighted_average": Call(
        "weighted_average",
        _weighted,
        {
            "values": "B T H V",
            "weight": "B T H 1",
            "decay": "-B T H 1",
            "bonus": "H 1",
            "mean": "B H V",
        },
        {**SIZES, "1": 1},
    ),
}
