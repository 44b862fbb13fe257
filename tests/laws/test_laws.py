"""The laws of the mixer contract, over every registered mixer, forward and gradients.

A mixer file that appears in jaxmem/mixers is picked up here by its registration alone. Its config
must build with default values at a width of 32. What a mixer is tried with are arguments of a few
compiled programs, one for each way to run it: other inputs, documents and weights cost nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.interop import attention_types
from jaxmem.mixers.base import Mixer, build, config_class, names
from jaxmem.nn.init import gpt2_init
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close

DIM, BATCH, CHUNK = 32, 3, 4
# Two documents with padding before, between, inside and after them, one short document, and a row
# without padding.
IDS = np.array([[0, 1, 1, 0, 1, 2, 2, 0, 2, 0, 0, 0], [1] * 3 + [0] * 9, [1] * 12])
LENGTH = IDS.shape[1]
ONE = np.ones_like(IDS)
"""One document in each row."""
TOLD = 8
"""Tokens whose documents the chunked form is told; further ones go on with their row's last."""
CONTINUED = IDS.copy()
CONTINUED[:, TOLD:] = [[2], [1], [1]]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "contextual_memory-conv": (
        "contextual_memory",
        {
            "key_kernel_size": 3,
            "value_extractor": "conv",
            "value_kernel_size": 4,
            "lag": 2,
            "use_bias": True,
        },
    ),
    # With its defaults its long-term memory has nothing to read in so short a sequence, so this
    # configuration stands in for the default one.
    "contextual_memory_v2": (
        "contextual_memory_v2",
        {"window": 3, "min_lag": 2, "max_lag": 4},
    ),
    "mamba2": ("mamba2", {"head_dim": 8, "state_dim": 4, "conv": 3}),
    "softmax_state-output": ("softmax_state", {"of": "output"}),
    # The default divides by a sum of squares: where these are small, features have few digits of
    # float32. It is tried in float64, with all other names, in test_published_names.py; and so is
    # the norm of `gated_softmax`, before which the gradient of a gate is next to nothing.
    "two_mamba": (
        "two_mamba",
        attention_types.fields(
            "squared__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values"
        ),
    ),
    "two_mamba-gated_softmax": (
        "two_mamba",
        attention_types.fields("gated_softmax_no_norm", "attention"),
    ),
    "two_mamba-linear_cosine": (
        "two_mamba",
        attention_types.fields("linear_cosine", "attention"),
    ),
}
"""Configurations that take other paths than the defaults: further ones, or in place of them."""

GRADIENTS = {
    # The gradient of a bandwidth is a sum of differences of nearly equal numbers, measured 1.5e-5.
    "contextual_memory_v2": GRADIENT._replace(rms=4e-5),
    # That of a scale is a sum over pairs that nearly cancel: measured 1.3e-5 and, between forms
    # that are 0.9e-5 (steps) and 2.8e-5 (whole rows) from float64, 2.0e-5.
    "contextual_memory": GRADIENT._replace(rms=4e-5),
    "persistent_memory": GRADIENT._replace(rms=6e-5),
}
"""Budgets of mixers that need a wider one."""

Run = Callable[[Mixer, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""From a mixer, inputs and documents to outputs and a state."""


class Result(NamedTuple):
    """What a program computes."""

    y: Any
    grads: Any
    """Of sum(y * weights), by parameters and by inputs."""
    state: Any


class Case:
    """A mixer with random parameters, inputs for it, and its compiled programs."""

    def __init__(self, name: str, **fields: Any):
        config = dataclasses.replace(config_class(name)(), chunk_size=CHUNK, **fields)
        self.supports = config.supports
        self.gradient = GRADIENTS.get(name, GRADIENT)
        self.mixer = build(config, DIM, init=gpt2_init(1), rngs=nnx.Rngs(0))
        self.graph, start = nnx.split(self.mixer, nnx.Param)
        draw = np.random.default_rng(1)

        # Initial weights are small; the laws should be tried where outputs and gradients are O(1).
        def moved(p: jax.Array) -> np.ndarray:
            return np.asarray(p + 0.1 * draw.normal(size=p.shape), p.dtype)

        self.params = jax.tree.map(moved, start)
        self.x = draw.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
        self.weights = np.cos(np.arange(self.x.size, dtype=np.float32)).reshape(self.x.shape)

    def fresh(self) -> Any:
        """Return the state before any token."""
        return self.mixer.init_state(BATCH, max_len=LENGTH)

    def program(self, run: Run) -> Callable[..., Result]:
        """Compile a function of inputs, documents, weights and parameters with its gradients."""

        def scalar(params: Any, x: Any, ids: Any, weights: Any) -> tuple[jax.Array, Any]:
            y, state = run(nnx.merge(self.graph, params), x, ids)
            return jnp.sum(y * weights), (y, state)

        compiled = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))

        def function(x: Any, ids: Any = IDS, weights: Any = None, params: Any = None) -> Result:
            weights = self.weights[:, : x.shape[1]] if weights is None else weights
            params = self.params if params is None else params
            (_, (y, state)), grads = jax.device_get(compiled(params, x, ids, weights))
            return Result(y, grads, state)

        return function

    @functools.cached_property
    def packed(self) -> Callable[..., Result]:
        """Rows of documents; one that fills its row is a whole row."""
        return self.program(lambda m, x, ids: (m(x, segment_ids=ids).y, None))

    @functools.cached_property
    def packed_chunks(self) -> Callable[..., Result]:
        """Rows of documents chunk by chunk, on from a state: two chunks, and one without ids."""

        def run(mixer: Mixer, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
            told = mixer(x[:, :TOLD], self.fresh(), segment_ids=ids[:, :TOLD], form="chunked")
            rest = mixer(x[:, TOLD:], told.state)
            return jnp.concatenate([told.y, rest.y], axis=1), rest.state

        return self.program(run)

    def parallel(self, x: Any, **more: Any) -> Result:
        """Whole rows."""
        return self.packed(x, ONE[:, : x.shape[1]], **more)

    def chunked(self, x: Any, **more: Any) -> Result:
        """Whole rows chunk by chunk, on from a state."""
        return self.packed_chunks(x, ONE, **more)

    @functools.cached_property
    def whole(self) -> Result:
        """What other forms are compared with."""
        return self.parallel(self.x)

    def alone(self, ids: np.ndarray) -> tuple[Any, Any]:
        """Return outputs and gradients of each document by itself, at its place in packed rows.

        Documents are rows for the program of whole rows. Other tokens, which causality keeps them
        from seeing, fill those behind.
        """
        places = [(row, np.flatnonzero(n == ids[row])) for row in range(BATCH) for n in (1, 2)]
        places = [(row, tokens) for row, tokens in places if len(tokens)]
        y, x_grad = np.zeros_like(self.x), np.zeros_like(self.x)
        params = jax.tree.map(np.zeros_like, self.params)
        while places:
            x, weights = self.x[:, ::-1].copy(), np.zeros_like(self.weights)
            batch = list(enumerate([places.pop() for _ in range(min(BATCH, len(places)))]))
            for at, (row, tokens) in batch:
                x[at, : len(tokens)] = self.x[row, tokens]
                weights[at, : len(tokens)] = self.weights[row, tokens]
            found = self.parallel(x, weights=weights)
            params = jax.tree.map(np.add, params, found.grads[0])
            for at, (row, tokens) in batch:
                y[row, tokens] = found.y[at, : len(tokens)]
                x_grad[row, tokens] = found.grads[1][at, : len(tokens)]
        return y, (params, x_grad)

    def call(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a function of the mixer and arrays under jit."""
        return jax.jit(lambda p, *a: run(nnx.merge(self.graph, p), *a))(self.params, *args)


CASES = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"laws of {name}"))  # which share programs
    for name in sorted({*names(), *VARIANTS})
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, fields = VARIANTS.get(request.param, (request.param, {}))
    return Case(name, **fields)


@pytest.fixture(autouse=True)
def _visible_exemptions(request: pytest.FixtureRequest, case: Case) -> None:
    law = request.node.get_closest_marker("law")
    if law is not None and law.args[0] not in case.supports:
        reason = f"{type(case.mixer).__name__} does not support the law {law.args[0]!r}"
        request.applymarker(pytest.mark.xfail(reason=reason, run=False, strict=False))


def stepwise(mixer: Mixer, x: jax.Array, ids: jax.Array | None, state: Any) -> tuple[Any, Any]:
    def body(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        out = mixer.step(inputs[0], state, segment_ids=inputs[1])
        return out.state, out.y

    tokens = (jnp.moveaxis(x, 1, 0), None if ids is None else ids.T)
    end, y = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(y, 0, 1), end


@pytest.mark.law("forms")
def test_forms_agree(case: Case):
    """Gradients through steps are those of packed rows, one of which has no padding."""
    assert float(np.std(case.whole.y)) > 0.05
    chunked = case.chunked(case.x)
    assert_close(chunked.y, case.whole.y, FORWARD)
    assert_close(chunked.grads, case.whole.grads, case.gradient)

    def forms(mixer: Mixer, x: jax.Array) -> Any:
        """Run forms without documents; the chunked one is that of rows that are split."""
        return mixer(x, implementation="xla").y, *stepwise(mixer, x, None, case.fresh())

    plain, steps, state = case.call(forms, case.x)
    assert_close(plain, case.whole.y, FORWARD)
    assert_close(steps, case.whole.y, FORWARD)
    assert_close(state, chunked.state, FORWARD)
    assert jax.eval_shape(lambda: state) == jax.eval_shape(case.fresh)


@pytest.mark.law("forms")
def test_implementations_agree(case: Case):
    """The reference has no documents, and its gradients are those of rows of one."""
    reference = case.program(lambda m, x, _: (m(x, implementation="reference").y, None))
    plain = reference(case.x)
    assert_close(case.whole.y, plain.y, FORWARD)
    assert_close(case.whole.grads, plain.grads, case.gradient)


@pytest.mark.law("splitting")
def test_splitting_is_invisible(case: Case):
    """Each row has a state of its own and is split behind no token and one, and by chunks."""

    def row(mixer: Mixer, x: jax.Array) -> tuple[jax.Array, Any]:
        none = mixer(x[None, :0], mixer.init_state(1, max_len=LENGTH))
        first = mixer(x[None, :1], none.state)
        rest = mixer(x[None, 1:], first.state, form="chunked")  # two chunks and three tokens
        y = jnp.concatenate([none.y, first.y, rest.y], axis=1)
        return jax.tree.map(lambda a: a[0], (y, rest.state))

    y, state = case.call(lambda m, x: jax.vmap(lambda row_x: row(m, row_x))(x), case.x)
    assert_close(y, case.whole.y, FORWARD)
    assert_close(state, case.chunked(case.x).state, FORWARD)


@pytest.mark.law("causality")
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_the_future_changes_nothing(case: Case, form: str):
    cut = 6
    run, changed = getattr(case, form), case.x.copy()
    changed[:, cut:] = 7.0
    weights = np.where(np.arange(LENGTH)[:, None] < cut, case.weights, 0.0)
    now = run(case.x, weights=weights)
    np.testing.assert_array_equal(now.y[:, :cut], run(changed).y[:, :cut])
    x_grad = now.grads[1]
    np.testing.assert_array_equal(x_grad[:, cut:], 0.0)
    # Otherwise a layer that looks at nothing would pass.
    assert float(np.max(np.abs(x_grad[:, cut - 1]))) > 0


@pytest.mark.law("packing")
@pytest.mark.parametrize("mode", ["parallel", "chunked", "step"])
def test_packed_documents_equal_documents_alone(case: Case, mode: str):
    """Tokens behind those of the chunked form go on without being told their document."""
    ids = CONTINUED if mode == "chunked" else IDS
    run = {
        "parallel": lambda: case.packed,
        "chunked": lambda: case.packed_chunks,
        "step": lambda: case.program(lambda m, x, ids: stepwise(m, x, ids, case.fresh())),
    }[mode]
    found = run()(case.x, ids)
    y, grads = case.alone(ids)
    np.testing.assert_array_equal(found.y[ids == 0], 0.0)
    np.testing.assert_array_equal(found.grads[1][ids == 0], 0.0)
    assert_close(found.y, y, FORWARD)
    assert_close(found.grads, grads, case.gradient)


@pytest.mark.law("state")
def test_state_is_a_plain_pytree_of_constant_shape(case: Case):
    state = jax.eval_shape(case.fresh)
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(state))
    after = case.chunked(case.x).state  # with documents and without, chunks and a whole call
    assert jax.eval_shape(lambda: after) == state  # structure, shapes and dtypes
    ids = jnp.ones((BATCH, LENGTH), jnp.int32)

    def states(x: jax.Array, state: Any) -> list[Any]:
        return [
            case.mixer(x, state).state,
            case.mixer(x, state, segment_ids=ids).state,
            case.mixer(x, state, form="chunked").state,
            case.mixer.step(x[:, 0], state).state,
        ]

    half = jax.ShapeDtypeStruct(case.x.shape, jnp.bfloat16)
    assert all(found == state for found in jax.eval_shape(states, half, state))
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(case.fresh()))
    assert case.mixer.state_bytes(BATCH, LENGTH) == counted
    assert jax.eval_shape(case.mixer, case.x).state is None


@pytest.mark.law("state")
def test_overrun_is_nan_for_its_row_only(case: Case):
    short, long = (
        jax.eval_shape(lambda n=n: case.mixer.init_state(BATCH, max_len=n))
        for n in (LENGTH - 2, LENGTH)
    )
    if short == long:
        return  # a state that does not grow cannot overrun
    ids = jnp.asarray([[1] * (LENGTH - 3) + [0] * 3, [1] * LENGTH, [1] * (LENGTH - 2) + [0] * 2])

    def run(mixer: Mixer, x: jax.Array) -> jax.Array:
        return mixer(x, mixer.init_state(BATCH, max_len=LENGTH - 2), segment_ids=ids).y

    y = case.call(run, case.x)
    assert bool(np.all(np.isfinite(y[0])))
    assert bool(np.all(np.isnan(y[1])))
    assert bool(np.all(np.isfinite(y[2])))


@pytest.mark.law("no_surprises")
def test_a_second_call_is_bit_equal(case: Case):
    np.testing.assert_array_equal(case.parallel(case.x).y, case.whole.y)


@pytest.mark.law("no_surprises")
def test_half_precision_inputs_accumulate_in_float32(case: Case):
    half = case.x.astype(jnp.bfloat16)
    narrow = case.call(lambda m, x: m(x).y, half)
    assert narrow.dtype == jnp.bfloat16
    assert_close(narrow, case.parallel(half.astype(np.float32)).y, BFLOAT16)


EXTREMES: dict[str, Callable[[Case], Result]] = {
    "zero": lambda case: case.parallel(np.zeros_like(case.x)),
    "equal": lambda case: case.parallel(np.ones_like(case.x)),
    "huge": lambda case: case.parallel(1e4 * case.x),
    "params0": lambda case: case.parallel(case.x, params=jax.tree.map(np.zeros_like, case.params)),
    "params30": lambda case: case.parallel(
        case.x, params=jax.tree.map(lambda p: 30 * p, case.params)
    ),
    "one": lambda case: case.parallel(case.x[:, :1]),
    "pad": lambda case: case.packed(case.x, np.array([[1], [0], [1]]) * np.ones_like(IDS)),
}


@pytest.mark.law("no_surprises")
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_stay_finite(case: Case, extreme: str):
    found = EXTREMES[extreme](case)
    for leaf in jax.tree.leaves((found.y, found.grads)):
        assert bool(np.all(np.isfinite(leaf)))
    if extreme == "pad":
        np.testing.assert_array_equal(found.y[1], 0.0)


@pytest.mark.law("batch")
def test_permuting_rows_permutes_outputs(case: Case):
    order = np.asarray([2, 0, 1])
    assert_close(case.parallel(case.x[order]).y, case.whole.y[order], FORWARD)


@pytest.mark.law("no_surprises")
def test_dropout_needs_rngs_and_differs_by_key(case: Case):
    config = case.mixer.config
    if not hasattr(config, "dropout"):
        assert not any("dropout" in f.name for f in dataclasses.fields(config))
        return
    mixer = build(
        dataclasses.replace(config, dropout=0.5), DIM, init=gpt2_init(1), rngs=nnx.Rngs(0)
    )
    graph, _ = nnx.split(mixer, nnx.Param)

    @functools.partial(jax.jit, static_argnums=3)
    def run(params: Any, x: jax.Array, key: jax.Array, form: str) -> jax.Array:
        return nnx.merge(graph, params)(x, rngs=nnx.Rngs(dropout=key), form=form).y

    for form in ("parallel", "chunked"):
        first, again, other = (run(case.params, case.x, jax.random.key(n), form) for n in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert float(np.max(np.abs(first - other))) > 0.01
        assert float(np.max(np.abs(first - case.whole.y))) > 0.01
    still, plain = (
        jax.jit(lambda p, x, g=g: nnx.merge(g, p)(x).y).lower(case.params, case.x).as_text()
        for g in (graph, case.graph)
    )
    assert still == plain
