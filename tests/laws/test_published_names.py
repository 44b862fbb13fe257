"""The laws for every published name of the two_mamba papers, one shape each, in float64.

A name has one test, for two programs are all that it needs to compile. The shapes that other
mixers are tried at (test_laws.py) are tried here on rows that cover all pairs of fields.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError
from jaxmem.interop.attention_types import ATTENTION, FIXED, MAMBA, from_name
from jaxmem.mixers.base import Mixer, MixerConfig, build
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.nn.init import uniform_init

DIM, HEADS, BATCH, CHUNK = 8, 2, 2, 3
# Padding before, between, inside and after documents, the first of which is that of the state.
IDS = np.array([0, 1, 1, 0, 1, 2, 2, 0, 2, 2, 0, 0], np.int32)
LENGTH = len(IDS)
PACKED = np.stack([IDS, np.zeros_like(IDS)])  # and a row of padding alone
DOCUMENTS = [np.flatnonzero(n == IDS) for n in (1, 2)]
CUT = 4
OPTIONS = {"num_heads": HEADS, "chunk_size": CHUNK}


def configs() -> dict[str, MixerConfig]:
    """Return a config for each name; names of one function share a test."""
    named: dict[str, MixerConfig] = {
        f"attention-{name}": from_name(name, "attention", **OPTIONS) for name in ATTENTION
    }
    named |= {
        f"fixed-{name}": from_name(name, "attention", fixed=True, **OPTIONS) for name in FIXED
    }
    named |= {f"mamba-{name}": from_name(name, **OPTIONS) for name in MAMBA}
    half = {"head_dim": DIM // 2, "state_dim": 4, "chunk_size": CHUNK}
    named["mamba-mamba"] = Mamba2Config(ssm_dim=DIM // 2, **half)
    return named


NAMES = configs()
DISTINCT = {config: name for name, config in reversed(NAMES.items())}
GRAMMAR = [config for config in DISTINCT if isinstance(config, TwoMambaConfig)]


def test_there_is_a_config_for_every_published_name():
    assert (len(ATTENTION), len(FIXED), len(MAMBA) + 1) == (29, 2, 28)
    # Four attention types repeat others, and one step of the build-up does.
    assert len(NAMES) - len(DISTINCT) == 5


class Runs(NamedTuple):
    """What other forms make of whole rows."""

    plain: Any
    """Without documents."""
    chunked: Any
    steps: Any
    states: tuple[Any, Any]
    """After the last chunk and after the last step."""


class Case:
    """A mixer with random parameters in float64."""

    def __init__(self, config: MixerConfig, batch: int = BATCH, length: int = LENGTH):
        self.config = config
        self.mixer = build(config, DIM, init=uniform_init(), rngs=nnx.Rngs(0))
        self.graph, start = nnx.split(self.mixer, nnx.Param)
        draw = np.random.default_rng(1)
        self.params = jax.tree.map(lambda p: np.asarray(p) + 0.3 * draw.normal(size=p.shape), start)
        self.x = draw.normal(size=(batch, length, DIM))
        self.weights = np.cos(np.arange(self.x.size)).reshape(self.x.shape)
        """Of the sum of outputs that is differentiated."""
        self.packed = jax.jit(self.both(lambda mixer, x, ids: mixer(x, segment_ids=ids).y))
        """Rows of documents, of which one that fills its row is a whole row."""

    def fresh(self) -> Any:
        """Return the state before any token."""
        return self.mixer.init_state(len(self.x), max_len=self.x.shape[1], dtype=jnp.float64)

    def both(self, run: Callable[..., jax.Array]) -> Callable[..., tuple[Any, Any]]:
        """Return a function of parameters, inputs, weights and more to outputs and gradients."""

        def scalar(params: Any, x: jax.Array, weights: Any, *more: Any) -> tuple[Any, Any]:
            y = run(nnx.merge(self.graph, params), x, *more)
            return jnp.sum(y * weights), y

        def function(*args: Any) -> tuple[Any, Any]:
            (_, y), grads = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(*args)
            return y, grads

        return function

    def whole(self, x: Any, params: Any = None, weights: Any = None) -> tuple[Any, Any]:
        """Return outputs and gradients of whole rows."""
        params = self.params if params is None else params
        weights = self.weights if weights is None else weights
        return self.packed(params, x, weights, np.ones_like(PACKED))

    def runs(self) -> Runs:
        """Run every other form forward and without documents, in one program.

        Their derivatives are those of the same ops: rows of the matrix compare them, and golden
        files those of whole rows without documents.
        """

        @jax.jit
        def program(params: Any, x: jax.Array) -> Runs:
            mixer = nnx.merge(self.graph, params)
            chunked, last, *_ = mixer(x, self.fresh(), form="chunked")
            steps, end = _steps(mixer, x, self.fresh())
            return Runs(mixer(x).y, chunked, steps, (last, end))

        return program(self.params, self.x)

    def alone(self) -> Any:
        """Return outputs and gradients of each document by itself, at its place in packed rows.

        Documents are whole rows. Tokens behind a document fill its row; that it does not see them
        is a law of its own.
        """
        x, weights = self.x[:, ::-1].copy(), np.zeros_like(self.weights)
        for row, places in enumerate(DOCUMENTS):
            x[row, : len(places)] = self.x[0, places]
            weights[row, : len(places)] = self.weights[0, places]
        y, (params, inputs) = self.whole(x, weights=weights)
        moved = np.zeros((2, *self.x.shape))
        for row, places in enumerate(DOCUMENTS):
            moved[0, 0, places] = y[row, : len(places)]
            moved[1, 0, places] = inputs[row, : len(places)]
        return moved[0], (params, moved[1])


def _steps(mixer: Mixer, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    def body(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        out = mixer.step(token, state)
        return out.state, out.y

    end, y = jax.lax.scan(body, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), end


def close(actual: Any, expected: Any) -> None:
    """Compare trees in float64, relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        size = float(np.max(np.abs(b), initial=0.0)) or 1.0
        # Some gradients are zero but for rounding, as that of a gate before a norm.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * size + 1e-13)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", DISTINCT.values())
def test_laws_of_a_name(name: str):
    case = Case(NAMES[name])
    y, _ = case.whole(case.x)
    assert float(np.std(y)) > 1e-3
    runs = case.runs()
    # Forms, each of which splits a row: at the edges of chunks, and everywhere.
    close(runs.plain, y)
    close(runs.chunked, y)
    close(runs.steps, y)
    close(*runs.states)
    # Packing: padding is silent, documents are alone.
    packed = case.packed(case.params, case.x, case.weights, PACKED)
    np.testing.assert_array_equal(packed[0][PACKED == 0], 0.0)
    np.testing.assert_array_equal(packed[1][1][PACKED == 0], 0.0)
    close(packed, case.alone())
    # Causality, to the bit, and that there is something to see.
    changed = np.where(np.arange(LENGTH)[:, None] < CUT, case.x, 2.0)
    later, _ = case.whole(changed)
    np.testing.assert_array_equal(later[:, :CUT], y[:, :CUT])
    assert float(np.max(np.abs(later[:, CUT:] - y[:, CUT:]))) > 1e-3
    # No surprises, and no row that knows another.
    again, _ = case.whole(case.x)
    np.testing.assert_array_equal(again, y)
    swapped, _ = case.whole(case.x[::-1])
    close(swapped[::-1], y)
    # Finite where everything is zero, also in the backward pass.
    for nothing in (jax.tree.map(np.zeros_like, case.params), case.params):
        found = case.whole(np.zeros_like(case.x), nothing)
        assert all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    # A state of constant shape, whose size is known without making it.
    fresh = jax.eval_shape(case.fresh)
    for state in runs.states:
        assert jax.eval_shape(lambda state=state: state) == fresh
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(fresh))
    single = case.mixer.init_state(BATCH, max_len=LENGTH)
    assert case.mixer.state_bytes(BATCH, LENGTH) == sum(a.nbytes for a in jax.tree.leaves(single))


@pytest.mark.parametrize("name", DISTINCT.values())
def test_only_states_of_fixed_size_do_not_grow(name: str):
    case = NAMES[name]
    mixer = build(case, DIM, init=uniform_init(), rngs=nnx.Rngs(0))
    constant = mixer.state_bytes(1, 10) == mixer.state_bytes(1, 1000)
    powers = isinstance(case, Mamba2Config) or (
        case.kernel in ("pow1", "pow2") and case.clamp is None
    )
    assert constant == powers


FIELDS: dict[str, tuple[Any, ...]] = {
    "feature": ("id", "relu", "silu", "elu1", "l2", "l2_heads"),
    "rope": ("none", "half", "pairs"),
    "scale_products": (True, False),
    "clamp": (None, 1.5),
    "kernel": ("exp", "pow1", "pow2", "taylor", "series", "head_series"),
    "decay": (
        "none",
        "discretize",
        "neg_softplus",
        "neg_softplus_dt",
        "neg_softplus2",
        "neg_silu",
        "lagged",
    ),
    "denominator": ("one", "count", "count_pow", "sum", "gate_sum"),
    "conv": (0, 2, 3, 4),
    "value": ("none", "dt", "sigmoid", "silu", "softplus", "softplus2"),
    "key_gate": ("none", "sigmoid", "count_pow"),
    "skip": (False, True),
    "out_gate": ("none", "pre", "post", "both", "z", "pre_exp"),
    "norm": ("none", "ln", "rms", "l2", "l2d", "rms_all"),
    "detach": (False, True),
    "eps": (0.0, 0.01),
    "dt_bias": (False, True),
}


ROWS, STARTS = 15, 10
PAIRS = 1536
"""Of the 1892 pairs of values, many of which do not fit together: 683 are in the names."""


def valid(fields: dict[str, Any]) -> TwoMambaConfig | None:
    """Return the config of a row, or None if its fields do not fit together."""
    try:
        config = TwoMambaConfig(**fields, terms=4, **OPTIONS)
        config.check(DIM, "row")
    except ConfigError:
        return None
    return config


Pairs = set[tuple[tuple[str, Any], tuple[str, Any]]]


def pairs_of(fields: dict[str, Any]) -> Pairs:
    """Return every pair of (field, value)."""
    return set(itertools.combinations(sorted(fields.items(), key=str), 2))


def seen_in(configs: Iterable[TwoMambaConfig]) -> Pairs:
    """Return the pairs of values of configs."""
    return set().union(*(pairs_of({name: getattr(c, name) for name in FIELDS}) for c in configs))


def climb(draw: np.random.Generator, seen: Pairs) -> tuple[int, dict[str, Any]]:
    """Change one field after another of a row drawn while that adds pairs that are not seen."""
    fields: dict[str, Any] = {}
    while not fields or valid(fields) is None:
        fields = {name: values[draw.integers(len(values))] for name, values in FIELDS.items()}
    most, last = len(pairs_of(fields) - seen), -1
    while most > last:
        last = most
        for name, values in FIELDS.items():
            for other in ({**fields, name: v} for v in values):
                new = len(pairs_of(other) - seen)
                if new > most and valid(other) is not None:
                    fields, most = other, new
    return most, fields


@functools.cache
def rows() -> list[TwoMambaConfig]:
    """Find valid rows, each the one of some that adds the most pairs of values not seen yet.

    Published names have seen theirs.
    """
    draw = np.random.default_rng(0)
    seen, chosen = seen_in(GRAMMAR), []
    for _ in range(ROWS):
        _, fields = max((climb(draw, seen) for _ in range(STARTS)), key=itemgetter(0))
        seen |= pairs_of(fields)
        chosen.append(valid(fields))
    return chosen


def test_rows_of_the_matrix_and_names_have_every_value():
    assert len(seen_in([*rows(), *GRAMMAR])) >= PAIRS
    for name, values in FIELDS.items():
        assert {getattr(config, name) for config in [*rows(), *GRAMMAR]} >= set(values), name


@pytest.mark.parametrize("row", range(ROWS))
def test_forms_of_a_row_at_other_shapes(row: int):
    """One token or two, and whole chunks, longer than those inside of ops; the batch is odd."""
    config = dataclasses.replace(rows()[row], chunk_size=33)
    case = Case(config, batch=3, length=66)
    few = 1 + row % 2

    @jax.jit
    def program(params: Any, x: jax.Array, weights: jax.Array) -> Any:
        mixer = nnx.merge(case.graph, params)
        whole = case.both(lambda mixer, x: mixer(x).y)(params, x, weights)
        chunked = case.both(lambda mixer, x: mixer(x, form="chunked").y)(params, x, weights)
        return whole, chunked, _steps(mixer, x, case.fresh())[0], mixer(x[:, :few]).y

    whole, chunked, steps, short = program(case.params, case.x, case.weights)
    close(chunked, whole)
    close(steps, whole[0])
    close(short, whole[0][:, :few])
