"""The laws of the mixer contract, over every registered mixer, forward and gradients.

A mixer file that appears in jaxmem/mixers is picked up here by its registration alone. Its config
must build with default values at a width of 32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.interop import attention_types
from jaxmem.mixers.base import Mixer, build, config_class, names
from jaxmem.nn.init import gpt2_init
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close

DIM, LENGTH, BATCH, CHUNK = 32, 11, 3, 4
# Two documents of 4 and 5 tokens with padding before, between, inside and after them.
PACKED = np.array([0, 1, 1, 0, 1, 1, 2, 2, 0, 2, 2, 2, 0, 0])
DOCUMENTS = [np.flatnonzero(n == PACKED) for n in (1, 2)]

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

GRADIENTS = {"contextual_memory_v2": GRADIENT._replace(rms=4e-5)}
"""Budgets of mixers that need a wider one: the gradient of a bandwidth is a sum of differences of
nearly equal numbers, measured 1.5e-5."""


class Case:
    """A mixer with random parameters as a pure function, and inputs for it."""

    def __init__(self, name: str, **fields: Any):
        config = dataclasses.replace(config_class(name)(), chunk_size=CHUNK, **fields)
        self.supports = config.supports
        self.gradient = GRADIENTS.get(name, GRADIENT)
        self.mixer = build(config, DIM, init=gpt2_init(1), rngs=nnx.Rngs(0))
        self.graph, start = nnx.split(self.mixer, nnx.Param)
        leaves, tree = jax.tree.flatten(start)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        # Initial weights are small; the laws should be tried where outputs and gradients are O(1).
        self.params = jax.tree.unflatten(
            tree,
            [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)],
        )
        self.x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, DIM))

    def value_and_grads(self, run: Callable[[Mixer, jax.Array], Any], x: jax.Array) -> Any:
        """Return outputs of `run` and the gradients of a random functional of them."""

        def scalar(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            y = run(nnx.merge(self.graph, params), x)
            weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * weights), y

        grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
        (_, y), grads = grad(self.params, x)
        return y, grads

    @functools.cached_property
    def whole(self) -> Any:
        """Return the output of whole rows and its gradients, what other forms are compared with."""
        return self.value_and_grads(lambda m, x: m(x, form="parallel").y, self.x)

    @functools.cached_property
    def alone(self) -> Any:
        """Return the same of each document by itself, at its place in packed rows."""

        def documents(mixer: Mixer, x: jax.Array) -> jax.Array:
            y = jnp.zeros_like(x)
            for document in DOCUMENTS:
                y = y.at[:, document].set(mixer(x[:, document]).y)
            return y

        return self.value_and_grads(documents, self.packed)

    @functools.cached_property
    def packed(self) -> jax.Array:
        """Rows to be cut into documents."""
        return jax.random.normal(jax.random.key(3), (BATCH, len(PACKED), DIM))

    def call(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a function of the mixer and arrays under jit."""
        return jax.jit(lambda p, *a: run(nnx.merge(self.graph, p), *a))(self.params, *args)


@pytest.fixture(scope="module", params=sorted({*names(), *VARIANTS}))
def case(request: pytest.FixtureRequest) -> Case:
    name, fields = VARIANTS.get(request.param, (request.param, {}))
    return Case(name, **fields)


@pytest.fixture(autouse=True)
def _visible_exemptions(request: pytest.FixtureRequest, case: Case) -> None:
    law = request.node.get_closest_marker("law")
    if law is not None and law.args[0] not in case.supports:
        reason = f"{type(case.mixer).__name__} does not support the law {law.args[0]!r}"
        request.applymarker(pytest.mark.xfail(reason=reason, run=False, strict=False))


def stepwise(mixer: Mixer, x: jax.Array) -> jax.Array:
    state = mixer.init_state(x.shape[0], max_len=x.shape[1])

    def body(state: Any, x_t: jax.Array) -> tuple[Any, jax.Array]:
        out = mixer.step(x_t, state)
        return out.state, out.y

    _, y = jax.lax.scan(body, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1)


@pytest.mark.law("forms")
def test_forms_agree(case: Case):
    whole = case.whole
    assert float(jnp.std(whole[0])) > 0.05
    for run in (lambda m, x: m(x, form="chunked").y, stepwise):
        y, grads = case.value_and_grads(run, case.x)
        assert_close(y, whole[0], FORWARD)
        assert_close(grads, whole[1], case.gradient)


@pytest.mark.law("forms")
def test_implementations_agree(case: Case):
    fast = case.value_and_grads(lambda m, x: m(x, implementation="xla").y, case.x)
    plain = case.value_and_grads(lambda m, x: m(x, implementation="reference").y, case.x)
    assert_close(fast[0], plain[0], FORWARD)
    assert_close(fast[1], plain[1], case.gradient)


@pytest.mark.law("splitting")
def test_splitting_is_invisible(case: Case):
    cuts = (0, 1, CHUNK, 6, LENGTH)

    def run(mixer: Mixer, x: jax.Array) -> tuple[Any, Any]:
        fresh = mixer.init_state(BATCH, max_len=LENGTH)
        whole = mixer(x, fresh)
        parts = []
        for cut in cuts:
            first = mixer(x[:, :cut], fresh)
            second = mixer(x[:, cut:], first.state, form="chunked" if cut == 6 else "parallel")
            parts.append((jnp.concatenate([first.y, second.y], axis=1), second.state))
        return (whole.y, whole.state), parts

    whole, parts = case.call(run, case.x)
    for part in parts:
        assert_close(part, whole, FORWARD)

    def split(mixer: Mixer, x: jax.Array) -> jax.Array:
        first = mixer(x[:, :6], mixer.init_state(BATCH, max_len=LENGTH))
        return jnp.concatenate([first.y, mixer(x[:, 6:], first.state).y], axis=1)

    y, grads = case.value_and_grads(split, case.x)
    assert_close(y, case.whole[0], FORWARD)
    assert_close(grads, case.whole[1], case.gradient)


@pytest.mark.law("causality")
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_the_future_changes_nothing(case: Case, form: str):
    cut = 6
    changed = case.x.at[:, cut:].set(7.0)
    run = lambda m, x: m(x, form=form).y  # noqa: E731
    np.testing.assert_array_equal(case.call(run, case.x)[:, :cut], case.call(run, changed)[:, :cut])
    _, (_, x_grad) = case.value_and_grads(lambda m, x: m(x, form=form).y[:, :cut], case.x)
    np.testing.assert_array_equal(x_grad[:, cut:], 0.0)
    # Otherwise a layer that looks at nothing would pass.
    assert float(jnp.max(jnp.abs(x_grad[:, cut - 1]))) > 0


@pytest.mark.law("packing")
@pytest.mark.parametrize("mode", ["parallel", "chunked", "state", "split", "step"])
def test_packed_documents_equal_documents_alone(case: Case, mode: str):
    x = case.packed
    ids = jnp.broadcast_to(jnp.asarray(PACKED), x.shape[:2])

    def packed(mixer: Mixer, x: jax.Array) -> jax.Array:
        if mode in ("parallel", "chunked"):
            return mixer(x, segment_ids=ids, form=mode).y
        state = mixer.init_state(BATCH, max_len=len(PACKED))
        if mode == "state":
            return mixer(x, state, segment_ids=ids).y
        if mode == "split":
            first = mixer(x[:, :7], state, segment_ids=ids[:, :7])
            second = mixer(x[:, 7:], first.state, segment_ids=ids[:, 7:])
            return jnp.concatenate([first.y, second.y], axis=1)

        def body(state: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            out = mixer.step(inputs[0], state, segment_ids=inputs[1])
            return out.state, out.y

        _, y = jax.lax.scan(body, state, (jnp.moveaxis(x, 1, 0), ids.T))
        return jnp.moveaxis(y, 0, 1)

    y, grads = case.value_and_grads(packed, x)
    expected_y, expected_grads = case.alone
    np.testing.assert_array_equal(y[:, PACKED == 0], 0.0)
    np.testing.assert_array_equal(grads[1][:, PACKED == 0], 0.0)
    assert_close(y, expected_y, FORWARD)
    assert_close(grads, expected_grads, case.gradient)


@pytest.mark.law("packing")
def test_rows_of_uneven_length_equal_rows_alone(case: Case):
    lengths = [3, LENGTH, 6]
    ids = jnp.asarray([[1] * n + [0] * (LENGTH - n) for n in lengths])
    more = jax.random.normal(jax.random.key(4), (BATCH, 2, DIM))

    def run(mixer: Mixer, x: jax.Array, more: jax.Array) -> tuple[Any, list[Any]]:
        state = mixer.init_state(BATCH, max_len=LENGTH + 2)
        together = mixer(more, mixer(x, state, segment_ids=ids).state).y
        alone = []
        for row, n in enumerate(lengths):
            one = slice(row, row + 1)
            state = mixer(x[one, :n], mixer.init_state(1, max_len=LENGTH + 2)).state
            alone.append(mixer(more[one], state).y)
        return together, alone

    together, alone = case.call(run, case.x, more)
    assert_close(together, jnp.concatenate(alone), FORWARD)


@pytest.mark.law("state")
def test_state_is_a_plain_pytree_of_constant_shape(case: Case):
    state = case.mixer.init_state(BATCH, max_len=LENGTH)

    def shapes(state: Any) -> tuple[Any, list[Any]]:
        leaves = jax.tree.leaves(state)
        return jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in leaves]

    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(state))
    ids = jnp.ones((BATCH, LENGTH), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = case.x.astype(dtype)
        for out in (
            case.call(lambda m, x, s: m(x, s).state, x, state),
            case.call(lambda m, x, s: m(x, s, segment_ids=ids).state, x, state),
            case.call(lambda m, x, s: m(x, s, form="chunked").state, x, state),
            case.call(lambda m, x, s: m.step(x[:, 0], s).state, x, state),
        ):
            assert shapes(out) == shapes(state)
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert case.mixer.state_bytes(BATCH, LENGTH) == counted
    assert case.mixer(case.x).state is None


@pytest.mark.law("state")
def test_state_may_be_vmapped(case: Case):
    def run(mixer: Mixer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def row(x: jax.Array) -> jax.Array:
            first = mixer(x[None, :5], mixer.init_state(1, max_len=LENGTH))
            return mixer(x[None, 5:], first.state).y[0]

        return jax.vmap(row)(x), mixer(x).y[:, 5:]

    mapped, plain = case.call(run, case.x)
    assert_close(mapped, plain, FORWARD)


@pytest.mark.law("state")
def test_overrun_is_nan_for_its_row_only(case: Case):
    state = case.mixer.init_state(BATCH, max_len=LENGTH - 2)
    if not any(leaf.shape[1:2] == (LENGTH - 2,) for leaf in jax.tree.leaves(state)):
        out = case.call(lambda m, x, s: m(x, s).y, case.x, state)
        assert bool(jnp.all(jnp.isfinite(out)))  # a state that does not grow cannot overrun
        return
    ids = jnp.asarray([[1] * (LENGTH - 3) + [0] * 3, [1] * LENGTH, [1] * (LENGTH - 2) + [0] * 2])
    y = case.call(lambda m, x, s: m(x, s, segment_ids=ids).y, case.x, state)
    assert bool(jnp.all(jnp.isfinite(y[0])))
    assert bool(jnp.all(jnp.isnan(y[1])))
    assert bool(jnp.all(jnp.isfinite(y[2])))


@pytest.mark.law("no_surprises")
def test_a_second_call_is_bit_equal(case: Case):
    run = lambda m, x: m(x).y  # noqa: E731
    np.testing.assert_array_equal(case.call(run, case.x), case.call(run, case.x))


@pytest.mark.law("no_surprises")
def test_half_precision_inputs_accumulate_in_float32(case: Case):
    narrow = case.call(lambda m, x: m(x).y, case.x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    wide = case.call(lambda m, x: m(x).y, case.x.astype(jnp.bfloat16).astype(jnp.float32))
    assert_close(narrow, wide, BFLOAT16)


@pytest.mark.law("no_surprises")
@pytest.mark.parametrize("extreme", ["zero", "equal", "huge", "params0", "params30", "one", "pad"])
def test_extremes_stay_finite(case: Case, extreme: str):
    x, params = case.x, case.params
    ids = None
    if extreme == "zero":
        x = jnp.zeros_like(x)
    elif extreme == "equal":
        x = jnp.ones_like(x)
    elif extreme == "huge":
        x = 1e4 * x
    elif extreme == "params0":
        params = jax.tree.map(jnp.zeros_like, params)
    elif extreme == "params30":
        params = jax.tree.map(lambda p: 30 * p, params)
    elif extreme == "one":
        x = x[:, :1]
    else:
        ids = jnp.ones(x.shape[:2], jnp.int32).at[1].set(0)

    def scalar(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(case.graph, params)(x, segment_ids=ids).y
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    (_, y), grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(params, x)
    assert bool(jnp.all(jnp.isfinite(y)))
    for leaf in jax.tree.leaves(grads):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    if extreme == "pad":
        np.testing.assert_array_equal(y[1], 0.0)


@pytest.mark.law("batch")
def test_permuting_rows_permutes_outputs(case: Case):
    order = jnp.asarray([2, 0, 1])
    run = lambda m, x: m(x).y  # noqa: E731
    assert_close(case.call(run, case.x[order]), case.call(run, case.x)[order], FORWARD)


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

    def run(params: Any, x: jax.Array, key: jax.Array, form: str) -> jax.Array:
        return nnx.merge(graph, params)(x, rngs=nnx.Rngs(dropout=key), form=form).y

    run = jax.jit(run, static_argnums=3)
    plain = case.call(lambda m, x: m(x).y, case.x)
    for form in ("parallel", "chunked"):
        first, again, other = (run(case.params, case.x, jax.random.key(n), form) for n in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert float(jnp.max(jnp.abs(first - other))) > 0.01
        assert float(jnp.max(jnp.abs(first - plain))) > 0.01
    still = jax.jit(lambda p, x: nnx.merge(graph, p)(x).y)(case.params, case.x)
    np.testing.assert_array_equal(still, plain)
