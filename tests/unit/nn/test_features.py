"""Windows of tokens and the features made of them, against loops over single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.nn.features import FeatureExtractor, KeyExtractor, ValueExtractor
from jaxmem.nn.init import fan_in_init
from jaxmem.nn.window import ahead, delays
from tests.helpers.compare import FORWARD, assert_close

DIM, HEADS, BATCH = 4, 2, 2
# Two documents with padding before, inside, between and after them; the second one is short.
IDS = np.array([[0, 3, 3, 0, 3, 3, 5, 0, 5, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]])
X = np.random.default_rng(0).normal(size=(*IDS.shape, DIM)).astype(np.float32)

DELAYS = jax.jit(delays)
LOOK_AHEAD = jax.jit(lambda module, x: module.look_ahead(x))
COMPLETED = jax.jit(lambda module, x, history: module.completed(x, history))


def loop_delays(history: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walk over the tokens of each row; returns [B T N+1 D] and the last history."""
    count = history.shape[1]
    delayed, after = np.zeros((*IDS.shape, count + 1, DIM)), []
    for row, ids in enumerate(IDS):
        window, document = list(history[row]), first[row]
        for t, segment in enumerate(ids):
            if segment == 0:
                continue
            if segment != document:
                window, document = [np.zeros(DIM)] * count, segment
            delayed[row, t] = [*window, X[row, t]]
            window = [*window, X[row, t]][1:]
        after.append(np.reshape(window, (count, DIM)))
    return delayed, np.stack(after)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("first", [(3, 3), (5, 3), (0, 0)], ids=["same", "other", "none"])
def test_delays_of_packed_rows(count: int, first: tuple[int, int]):
    history = np.random.default_rng(1).normal(size=(BATCH, count, DIM)).astype(np.float32)
    delayed, after = DELAYS(X, history, np.int32(IDS), np.int32(first))
    expected, expected_after = loop_delays(history, np.asarray(first))
    assert len(delayed) == count + 1
    real = IDS != 0
    np.testing.assert_array_equal(
        np.stack(delayed, axis=2)[real], expected[real].astype(np.float32)
    )
    np.testing.assert_array_equal(after, expected_after.astype(np.float32))


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_delays_of_one_document_may_be_cut(cut: int):
    nothing, one = np.zeros((BATCH, 3, DIM), np.float32), np.ones(BATCH, np.int32)
    whole, end = DELAYS(X, nothing, None, None)
    ids = np.ones(IDS.shape, np.int32)
    for first_ids, second_ids in ((None, None), (ids[:, :cut], ids[:, cut:])):
        first, history = DELAYS(X[:, :cut], nothing, first_ids, one)
        second, after = DELAYS(X[:, cut:], history, second_ids, one)
        joined = [np.concatenate(parts, axis=1) for parts in zip(first, second, strict=True)]
        np.testing.assert_array_equal(joined, whole)
        np.testing.assert_array_equal(after, end)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_ahead_counts_real_tokens(steps: int):
    got = np.asarray(jax.jit(ahead, static_argnums=1)(X, steps, IDS != 0))
    for row, ids in enumerate(IDS):
        places = np.flatnonzero(ids)
        for t in range(len(ids)):
            later = places[places > t]
            expected = X[row, later[steps - 1]] if len(later) >= steps else 0.0
            np.testing.assert_array_equal(got[row, t], expected)


def extractor(kind: str, kernel_size: int, shift: int) -> FeatureExtractor:
    module = FeatureExtractor(
        DIM,
        HEADS,
        kind,
        kernel_size=kernel_size,
        shift=shift,
        use_bias=True,
        init=fan_in_init(1),
        rngs=nnx.Rngs(0),
    )
    module.projection.bias[...] = jnp.asarray(np.arange(DIM) / 10.0, jnp.float32)
    return module


def loop_features(module: FeatureExtractor, kind: str, x: np.ndarray, t: int) -> np.ndarray:
    """The equation of one token of one row that is one document, channels merged."""
    kernel, bias = (np.asarray(p[...]) for p in (module.projection.kernel, module.projection.bias))

    def at(i: int) -> np.ndarray:
        return x[i] if 0 <= i < len(x) else np.zeros(DIM)

    if kind == "conv":
        weights = kernel.reshape(-1, DIM, DIM)
        first = t + module.shift - (len(weights) - 1)
        return bias + sum(at(first + j) @ weights[j] for j in range(len(weights)))
    u = x @ kernel + bias
    later = u[t + module.shift] if t + module.shift < len(u) else np.zeros(DIM)
    share = np.repeat(np.asarray(module.mix[...]), DIM // HEADS)
    return share * u[t] + (1 - share) * later


KINDS = [("conv", 1, 0), ("conv", 4, 0), ("conv", 2, 1), ("conv", 3, 2), ("conv", 2, 3)]
KINDS += [("mix", 2, 0), ("mix", 2, 1), ("mix", 2, 3)]
IDS_OF_KINDS = [f"{kind}{size}s{shift}" for kind, size, shift in KINDS]


@pytest.mark.parametrize(("kind", "size", "shift"), KINDS, ids=IDS_OF_KINDS)
def test_features_are_their_equation(kind: str, size: int, shift: int):
    module = extractor(kind, size, shift)
    features = LOOK_AHEAD(module, X)
    assert features.shape == (*IDS.shape, HEADS, DIM // HEADS)
    expected = [[loop_features(module, kind, x, t) for t in range(len(x))] for x in X]
    assert_close(np.reshape(features, X.shape), np.asarray(expected), FORWARD)


@pytest.mark.parametrize(("kind", "size", "shift"), KINDS, ids=IDS_OF_KINDS)
def test_completed_features_are_the_same_later(kind: str, size: int, shift: int):
    module = extractor(kind, size, shift)
    nothing = module.init_history(BATCH, X.dtype)
    assert nothing.shape == (BATCH, module.span, DIM)
    cut = X.shape[1] // 2
    first, history = COMPLETED(module, X[:, :cut], nothing)
    second, _ = COMPLETED(module, X[:, cut:], history)
    done, whole = np.concatenate([first, second], axis=1), np.asarray(LOOK_AHEAD(module, X))
    assert_close(done[:, shift:], whole[:, : X.shape[1] - shift], FORWARD)


def test_a_kernel_of_one_token_is_a_projection():
    module = extractor("conv", 1, 0)
    assert module.mix is None
    np.testing.assert_array_equal(
        module.look_ahead(jnp.asarray(X)).reshape(X.shape), module.projection(jnp.asarray(X))
    )


def test_vectors_of_length_zero_are_safe():
    """A share of 0 makes the last value 0, inputs of 0 make every key 0: no NaN, either way."""
    options = {"use_bias": False, "init": fan_in_init(1), "rngs": nnx.Rngs(0)}
    value = ValueExtractor(DIM, HEADS, "mix", kernel_size=2, shift=1, **options)
    key = KeyExtractor(DIM, HEADS, "conv", kernel_size=2, scale_limit=10.0, **options)
    value.mix[...] = jnp.zeros(HEADS)
    key.decay[...] = jnp.zeros(HEADS)
    for module, run in ((value, lambda m, x: m(x)), (key, lambda m, x: m(x, None)[0])):
        graph, params = nnx.split(module, nnx.Param)

        def total(params, x, graph=graph, run=run):
            features = run(nnx.merge(graph, params), x)
            return jnp.sum(jnp.cos(jnp.arange(2.0)) * features), features

        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        for x in (np.zeros_like(X), X):
            (_, features), grads = program(params, x)
            for leaf in jax.tree.leaves((features, grads)):
                assert np.all(np.isfinite(leaf))
        if module is value:
            np.testing.assert_array_equal(features[:, -1], 0.0)


@pytest.mark.parametrize(
    ("stored", "scale"), [(0.1, np.exp(2.0)), (0.5, np.exp(10.0)), (0.6, np.exp(10.0))]
)
def test_the_scale_is_squared_and_limited(stored: float, scale: float):
    options = {"use_bias": False, "init": fan_in_init(1), "rngs": nnx.Rngs(0)}
    key = KeyExtractor(DIM, HEADS, "conv", kernel_size=1, scale_limit=10.0, **options)
    key.scale[...] = jnp.full(HEADS, stored)
    np.testing.assert_allclose(key.logit_scale(), scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ContextualMemoryConfig(lag=0), r"slot\.lag=0"),
        (ContextualMemoryConfig(value_kernel_size=0), r"slot\.value_kernel_size=0"),
        (PersistentMemoryConfig(key_kernel_size=-1), r"slot\.key_kernel_size=-1"),
        (PersistentMemoryConfig(weight_dropout=1.0), r"slot\.weight_dropout=1\.0"),
    ],
    ids=["lag", "value_kernel", "key_kernel", "weight_dropout"],
)
def test_configs_that_make_no_sense(config, words: str):
    with pytest.raises(ConfigError, match=words):
        config.check(32, "slot")


def test_read_weights_may_have_a_dropout_of_their_own():
    assert ContextualMemoryConfig(dropout=0.2).read_dropout == 0.2
    assert ContextualMemoryConfig(dropout=0.2, weight_dropout=0.0).read_dropout == 0.0
