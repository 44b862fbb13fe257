"""Mistakes in the calls of ops: each has one message, whichever op is called."""

from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DTypeError, JaxmemError, ShapeError, UnknownName
from jaxmem.ops.attention import Dropout, Places, attention, attention_with_lse
from jaxmem.ops.gated_scan import gated_scan
from jaxmem.ops.leaky_average import LeakyState, leaky_average
from jaxmem.ops.persistent_read import persistent_read
from jaxmem.ops.weighted_average import WeightedState, weighted_average


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


X, FLAT, RATE = ones(2, 5, 2, 4), ones(2, 5, 4), ones(2)
TABLE, IDS, ROW = ones(1, 2, 7, 4), ones(2, 5, dtype=np.int32), ones(2, dtype=np.int32)
SUMS, KEY = ones(2, 2, 4), jax.random.key(0)
Call = tuple[Callable[..., Any], dict[str, Any]]

# Operands and options of a call that is right, floating-point ones first.
CALLS: dict[str, Call] = {
    "attention": (
        attention,
        {"q": X, "k": X, "v": X, "scale": RATE, "log_forget": X[..., 0], "value_gate": X[..., 0]},
    ),
    "attention_with_lse": (attention_with_lse, {"q": X, "k": X, "v": X, "scale": RATE}),
    "gated_scan": (gated_scan, {"x": FLAT, "log_decay": FLAT, "initial_state": FLAT[:, 0]}),
    "leaky_average": (leaky_average, {"x": X, "rate": RATE}),
    "persistent_read": (
        persistent_read,
        {"q": X, "keys": TABLE, "values": TABLE, "scale": RATE},
    ),
    "weighted_average": (
        weighted_average,
        {"values": X, "log_weight": X, "log_decay": X, "bonus": X},
    ),
}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch):
    """Let bad arguments reach the op, as they do without the hook of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


ARGUMENTS = [(op, name) for op, (_, options) in CALLS.items() for name in options]


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_only_floating_point_is_taken(op: str, name: str, dtype: str):
    call, options = CALLS[op]
    # Not a conversion: complex to real warns.
    bad = jax.ShapeDtypeStruct(options[name].shape, dtype)
    message = rf"{op.removesuffix('_with_lse')}: {name} is {dtype}, .*Cast it to float32 or bfloat"
    with pytest.raises(DTypeError, match=message) as caught:
        call(**{**options, name: bad})
    assert isinstance(caught.value, JaxmemError)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", CALLS)
def test_floating_point_is_taken(op: str, dtype: str):
    call, options = CALLS[op]
    with jax.enable_x64(dtype == "float64"):
        given = {name: jax.ShapeDtypeStruct(a.shape, dtype) for name, a in options.items()}
        out = jax.eval_shape(lambda given: call(**given, implementation="xla"), given)
    assert jax.tree.leaves(out)[0].dtype == dtype


def state(total: Any = SUMS, weight: Any = None) -> dict[str, Any]:
    return {"initial_state": LeakyState(total, weight)}


def means(mean: Any = SUMS, log_total: Any = SUMS) -> dict[str, Any]:
    return {"initial_state": WeightedState(mean, log_total)}


def places(**wrong: Any) -> dict[str, Any]:
    return {"places": Places(*(IDS,) * 4)._replace(**wrong)}


WRONG_SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("leaky_average", state(SUMS[:1]), r"total has shape \(1, 2, 4\).*shape \(2, 2, 4\)"),
    ("leaky_average", state(SUMS[..., :3]), r"total has shape \(2, 2, 3\).*shape \(2, 2, 4\)"),
    (
        "leaky_average",
        {"scaling": "normalised"} | state(weight=SUMS),
        r"weight has shape \(2, 2, 4\).*shape \(2, 2, 1\)",
    ),
    ("leaky_average", {"scaling": "normalised"} | state(), "has no weight, which only `normalis"),
    ("leaky_average", state(weight=SUMS[..., :1]), "has a weight, .* the scaling is 'sum'"),
    ("leaky_average", {"x": X[0]}, r"x has shape \(5, 2, 4\). Pass x \[B T H K\]"),
    ("gated_scan", {"initial_state": FLAT[:, :1]}, r"shape \(2, 1, 4\).*shape \(2, 4\)"),
    ("gated_scan", {"x": FLAT[0]}, r"x has shape \(5, 4\). Pass x \[B T D\]"),
    ("weighted_average", means(SUMS[:1]), r"mean has shape \(1, 2, 4\).*shape \(2, 2, 4\)"),
    ("weighted_average", means(SUMS[..., :3]), r"mean has shape \(2, 2, 3\).*shape \(2, 2, 4\)"),
    ("weighted_average", means(log_total=SUMS[:1]), r"log_total has shape \(1, 2, 4\)"),
    ("weighted_average", {"values": X[..., :0]}, r"an axis of values \(2, 5, 2, 0\) is empty"),
    ("weighted_average", {"values": X[0]}, r"values has shape .*\[B T H V\]"),
    ("persistent_read", {"scale": ones(3)}, r"shape \(3,\).*one number.*shape \(2,\)"),
    ("persistent_read", {"scale": ones(2, 1)}, r"shape \(2, 1\).*one number"),
    ("persistent_read", {"q": X[0]}, r"q has shape .*\[B T H K\]"),
    ("attention", {"scale": ones(3)}, r"shape \(3,\).*one number.*shape \(2,\)"),
    ("attention", {"scale": ones(1)}, r"shape \(1,\).*one number.*shape \(2,\)"),
    ("attention", {"k": X[0]}, r"k has shape .*\[B S G K\]"),
    ("attention", places(query=IDS[:1]), r"places.query has shape \(1, 5\).*per query.*\(2, 5\)"),
    ("attention", places(key=IDS[:, :3]), r"places.key has shape \(2, 3\).*per key.*\(2, 5\)"),
    ("attention", places(query_segment=IDS[0]), r"places.query_segment has shape \(5,\)"),
    ("attention", places(key_segment=IDS[:, 1:]), r"places.key_segment has shape \(2, 4\)"),
]
PACKED = ("attention", "attention_with_lse", "gated_scan", "leaky_average", "weighted_average")
WRONG_SHAPES += [
    (op, {"segment_ids": ids}, r"segment_ids has shape .*document of each token, shape \(2, 5\)")
    for op in PACKED
    for ids in (IDS[:1], IDS[:, :4], ROW)
]
WRONG_SHAPES += [
    (op, {"segment_ids": IDS, "initial_segment": IDS}, r"initial_segment .*shape \(2,\)")
    for op in PACKED[2:]
]


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize(("op", "wrong", "message"), WRONG_SHAPES)
def test_shapes_that_do_not_fit(op: str, wrong: dict[str, Any], message: str, implementation: str):
    call, options = CALLS[op]
    with pytest.raises(ShapeError, match=f"^{op.removesuffix('_with_lse')}: .*{message}"):
        call(**{**options, **wrong}, implementation=implementation)


@pytest.mark.parametrize("op", ["attention", "attention_with_lse", "persistent_read"])
@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan")])
def test_rates_of_dropout(op: str, rate: float):
    call, options = CALLS[op]
    with pytest.raises(ConfigError, match=rf"dropout.rate={rate} is not in \[0, 1\)"):
        call(**options, dropout=Dropout(rate, KEY))


@pytest.mark.parametrize("op", ["attention", "persistent_read"])
def test_one_scale_for_all_heads(op: str):
    call, options = CALLS[op]
    arrays = {name: a for name, a in options.items() if name != "scale"}

    @jax.jit
    def read(arrays: dict[str, Any], scale: Any) -> list[Any]:
        return [call(**arrays, scale=s) for s in (scale, 0.5)]

    expected, _ = read(arrays, np.full(2, 0.5, np.float32))
    for found in read(arrays, np.float32(0.5)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "op", ["attention", "attention_with_lse", "leaky_average", "persistent_read"]
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_names_of_precisions(op: str, implementation: str):
    call, options = CALLS[op]
    with pytest.raises(UnknownName, match=r"Unknown precision 'hihg'. Did you mean high"):
        call(**options, precision="hihg", implementation=implementation)


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_of_chunks(size: int):
    with pytest.raises(ConfigError, match=rf"chunk_size={size} is no number of tokens. Use 1 or"):
        leaky_average(X, RATE, chunk_size=size)
