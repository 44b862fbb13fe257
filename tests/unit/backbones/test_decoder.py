"""The decoder: its size, its start, and its ways to run, for a Memory Mosaic and its GPT twin."""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder, DecoderConfig, DecoderState
from jaxmem.errors import ConfigError, ShapeError
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.mixers.root_orders import RootOrdersConfig
from jaxmem.mixers.softmax_state import SoftmaxStateConfig
from jaxmem.mixers.two_mamba import TwoMambaConfig
from tests.helpers.compare import BFLOAT16, FORWARD, GRADIENT, assert_close
from tests.helpers.parameter_count import parameter_count

ROWS, LENGTH, VOCAB = 3, 10, 11
HALF = LENGTH // 2
MAX_LEN = 3 * HALF
"""Of the states: more than there are learned positions."""
# Documents of 4 and 3 tokens, padding before, between and after them.
PACKED = np.array([0, 1, 1, 1, 0, 1, 2, 2, 2, 0])
ONE = np.ones((ROWS, LENGTH), np.int32)
"""One document in each row."""
TOKENS = np.random.default_rng(2).integers(0, VOCAB, (ROWS, LENGTH), np.int32)


def config_of(kind: str, *, heads: int, memory: int, **fields: Any) -> DecoderConfig:
    if kind == "mosaic":
        return DecoderConfig(
            mixer=ContextualMemoryConfig(num_heads=heads),
            feed_forward=PersistentMemoryConfig(num_heads=heads, memory_size=memory),
            **fields,
        )
    if kind in ("library", "convolutions"):
        library = {"num_heads": heads, "scale_limit": LIBRARY_LIMIT}
        values = "conv" if kind == "convolutions" else "mix"
        return DecoderConfig(
            mixer=ContextualMemoryConfig(**library, value_extractor=values),
            feed_forward=PersistentMemoryConfig(**library, memory_size=memory),
            scale_logits=True,
            init="fan_in",
            **fields,
        )
    return DecoderConfig(
        mixer=AttentionConfig(num_heads=heads),
        feed_forward=MLPConfig(),
        positions="learned",
        **fields,
    )


def small(kind: str) -> DecoderConfig:
    config = config_of(kind, heads=2, memory=12, vocab_size=VOCAB, context_len=12, dim=16, depth=2)
    mixer = dataclasses.replace(config.mixer, chunk_size=HALF)
    return dataclasses.replace(config, mixer=mixer)


class Model:
    """A decoder with parameters of order 1, and its compiled programs.

    Rows, documents, states and places are arguments of these, so that tests share them.
    """

    def __init__(self, kind: str):
        self.model = Decoder(small(kind), rngs=nnx.Rngs(0))
        self.graph, start = nnx.split(self.model, nnx.Param)
        draw = np.random.default_rng(1)
        self.params = jax.tree.map(lambda p: np.float32(p + 0.2 * draw.normal(size=p.shape)), start)
        self.fresh = jax.device_get(self.model.init_state(ROWS, max_len=MAX_LEN))
        self.plain = self.compiled(lambda m, tokens: m(tokens).logits)
        self.packed = self.compiled(lambda m, tokens, ids: m(tokens, segment_ids=ids).logits)
        self.placed = self.compiled(lambda m, tokens, at: m(tokens, positions=at).logits)
        self.chunked = self.compiled(lambda m, tokens, state: m(tokens, state, form="chunked"))
        self.step = self.compiled(lambda m, token, state: m.step(token, state))
        self.half = self.compiled(lambda m, tokens, ids, state: m(tokens, state, segment_ids=ids))
        """Half of a row, on from a state."""

    def compiled(self, run: Any) -> Any:
        """Return a jitted function of the model as one of arrays."""
        program = jax.jit(lambda p, *a: run(nnx.merge(self.graph, p), *a))
        return lambda *arrays: jax.device_get(program(self.params, *arrays))

    def halves(self, tokens: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, DecoderState]:
        """Run rows half by half from the start; return their logits and the state after."""
        first = self.half(tokens[:, :HALF], ids[:, :HALF], self.fresh)
        second = self.half(tokens[:, HALF:], ids[:, HALF:], first.state)
        return np.concatenate([first.logits, second.logits], axis=1), second.state


@pytest.fixture(scope="module", params=["mosaic", "gpt"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def abstract(config: DecoderConfig, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Return the graph of a decoder and the shapes of its parameters."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=dtype))
    return nnx.split(decoder, nnx.Param)


@pytest.mark.parametrize(
    ("kind", "count", "sizes"),
    [
        ("mosaic", 796_016, (4, 4, 128, 448, 64, 65)),
        ("gpt", 804_096, (4, 4, 128, 448, 64, 65)),
        ("mosaic", 10_647_036, (6, 6, 384, 1344, 256, 65)),
        ("gpt", 10_745_088, (6, 6, 384, 1344, 256, 65)),
        ("mosaic", 123_588_336, (12, 12, 768, 2688, 1024, 50304)),
        ("gpt", 124_373_760, (12, 12, 768, 2688, 1024, 50304)),
        ("library", 123_588_336, (12, 12, 768, 2688, 512, 50304)),
        ("convolutions", 130_666_080, (12, 12, 768, 2688, 512, 50304)),
        ("library", 353_554_048, (24, 16, 1024, 3584, 1024, 50304)),
        ("library", 756_822_144, (24, 16, 1536, 5376, 1024, 50304)),
        ("library", 396_528, (2, 8, 128, 448, 1000, 20)),
    ],
)
def test_parameter_counts(kind: str, count: int, sizes: tuple[int, ...]):
    depth, heads, dim, memory, context, vocab = sizes
    config = config_of(
        kind,
        heads=heads,
        memory=memory,
        vocab_size=vocab,
        context_len=context,
        dim=dim,
        depth=depth,
    )
    assert parameter_count(config) == count


@pytest.mark.parametrize("kind", ["mosaic", "gpt"])
def test_a_model_holds_nothing_but_float32_parameters(kind: str):
    make = partial(Decoder, small(kind), compute_dtype=jnp.bfloat16)
    _, params, rest = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", ["mosaic", "gpt"])
def test_initial_statistics(kind: str):
    """Every leaf is named here, so that a new one has to say what it starts from."""
    config = config_of(kind, heads=4, memory=100, vocab_size=100, context_len=100, dim=64, depth=2)
    config = dataclasses.replace(
        config, use_bias=True, mixer=dataclasses.replace(config.mixer, use_bias=True)
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    residual = 0.02 / math.sqrt(2 * 2)
    spreads = {
        "embedding/table": 0.02,
        "position/table": 0.02,
        "key/projection/kernel": 0.02,
        "value/projection/kernel": 0.02,
        "qkv/kernel": 0.02,
        "up/kernel": 0.02,
        "out/kernel": residual,
        "down/kernel": residual,
        "feed_forward/keys": 1 / 4,  # 1 / sqrt of the width per head, 16
        "feed_forward/values": 1 / 4,
    }
    constants = {
        "norm/weight": 1.0,
        "norm_1/weight": 1.0,
        "norm_2/weight": 1.0,
        "bias": 0.0,
        "key/decay": np.linspace(0.05, 0.5, 4),
        "key/scale": 0.1,
        "value/scale": -0.05,
        "feed_forward/scale": -0.05,
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        name = name.removesuffix("/value")
        value = np.asarray(leaf)
        spread = [s for suffix, s in spreads.items() if name.endswith(suffix)]
        constant = [c for suffix, c in constants.items() if name.endswith(suffix)]
        if spread:
            tolerance = 5 / math.sqrt(2 * value.size)  # five standard errors of a deviation
            assert np.std(value) == pytest.approx(spread[0], rel=tolerance), name
            assert abs(np.mean(value)) < 5 * spread[0] / math.sqrt(value.size), name
        elif constant:
            np.testing.assert_allclose(value, np.broadcast_to(constant[0], value.shape), rtol=1e-6)
        else:
            assert name.endswith("value/mix"), name
            assert np.all((value >= 0) & (value < 1))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_initial_statistics_of_the_library(tied: bool):
    config = config_of(
        "convolutions", heads=4, memory=100, vocab_size=100, context_len=9, dim=64, depth=4
    )
    model = Decoder(dataclasses.replace(config, tie_embedding=tied), rngs=nnx.Rngs(0))
    block = model.blocks[1]
    spreads = [
        (block.mixer.key.projection.kernel, 1 / 8),  # 1 / sqrt(inputs)
        (block.mixer.value.projection.kernel, 1 / math.sqrt(2 * 64)),
        (block.mixer.out.kernel, 1 / 8 / math.sqrt(4)),  # and 1 / sqrt(depth)
        (block.feed_forward.out.kernel, 1 / 8 / math.sqrt(4)),
        (block.feed_forward.keys, 1 / 4),
        (model.embedding.table, 1 / 8 if tied else 1.0),
    ]
    spreads += [] if tied else [(model.head.table, 1 / 8)]
    for leaf, spread in spreads:
        tolerance = 5 / math.sqrt(2 * leaf.size)
        assert np.std(np.asarray(leaf[...])) == pytest.approx(spread, rel=tolerance), leaf.shape


def test_layers_and_seeds_start_differently():
    def first(seed: int) -> list[np.ndarray]:
        model = Decoder(small("mosaic"), rngs=nnx.Rngs(seed))
        return [np.asarray(b.mixer.out.kernel[...]) for b in model.blocks]

    zero, one = first(0), first(1)
    np.testing.assert_array_equal(zero, first(0))
    assert not np.allclose(zero[0], zero[1])
    assert not np.allclose(zero[0], one[0])


def test_forms_agree(model: Model):
    plain = model.plain(TOKENS)
    assert plain.shape == (ROWS, LENGTH, VOCAB)
    assert float(np.std(plain)) > 0.05
    chunked = model.chunked(TOKENS, model.fresh)
    stepped, end = [], model.fresh
    for token in TOKENS.T:
        logits, end, _ = model.step(token, end)
        stepped.append(logits)
    assert_close(chunked.logits, plain, FORWARD)
    assert_close(np.stack(stepped, axis=1), plain, FORWARD)
    assert_close(model.halves(TOKENS, ONE), (plain, chunked.state), FORWARD)
    assert_close(end, chunked.state, FORWARD)
    np.testing.assert_array_equal(end.position, LENGTH)


def test_a_state_holds_a_context_by_default(model: Model):
    default, told = (
        jax.eval_shape(lambda n=n: model.model.init_state(ROWS, max_len=n)) for n in (None, 12)
    )
    assert default == told


def test_no_state_in_none_out(model: Model):
    out = nnx.eval_shape(lambda: model.model(jnp.asarray(TOKENS)))
    assert out.state is None
    assert out.aux == {}
    assert out.logits.dtype == jnp.float32


def test_packed_documents_equal_documents_alone(model: Model):
    """With learned positions this needs positions that start anew with each document."""
    ids = np.broadcast_to(PACKED, TOKENS.shape)
    ways = [model.packed(TOKENS, ids), model.halves(TOKENS, ids)[0]]
    assert all(np.all(np.isfinite(packed)) for packed in ways)
    for number in (1, 2):
        places = np.flatnonzero(number == PACKED)
        alone = TOKENS[:, ::-1].copy()  # other tokens stand behind the document
        alone[:, : len(places)] = TOKENS[:, places]
        expected = model.plain(alone)[:, : len(places)]
        for packed in ways:
            assert_close(packed[:, places], expected, FORWARD)


def test_rows_of_uneven_length_go_on_as_rows_alone(model: Model):
    lengths = [2, 5, 3]
    ids = np.less(np.arange(HALF), np.array(lengths)[:, None]).astype(np.int32)
    prompts = model.half(TOKENS[:, :HALF], ids, model.fresh)
    together = model.step(TOKENS[:, 7], prompts.state)
    alone = TOKENS.copy()
    alone[range(ROWS), lengths] = TOKENS[:, 7]
    assert_close(together.logits, model.plain(alone)[range(ROWS), lengths], FORWARD)
    np.testing.assert_array_equal(together.state.position, [3, 6, 4])


def test_a_padded_step_changes_nothing(model: Model):
    before = model.half(TOKENS[:, :HALF], ONE[:, :HALF], model.fresh).state
    step = model.compiled(lambda m, token, state, ids: m.step(token, state, segment_ids=ids))
    out = step(TOKENS[:, HALF], before, np.array([1, 0, 1]))
    row = lambda state: jax.tree.map(lambda leaf: leaf[1], state)  # noqa: E731
    assert_close(row(out.state), row(before), FORWARD)
    np.testing.assert_array_equal(out.state.position, [6, 5, 6])
    assert np.all(np.isfinite(out.logits))


def test_no_token_changes_nothing(model: Model):
    before = model.half(TOKENS[:, :HALF], ONE[:, :HALF], model.fresh).state
    none = jnp.zeros((ROWS, 0), jnp.int32)
    for ids in (None, none):
        out = model.model(none, before, segment_ids=ids)
        assert out.logits.shape == (ROWS, 0, VOCAB)
        jax.tree.map(np.testing.assert_array_equal, out.state, before)
    fresh = model.model(none)
    assert fresh.logits.shape == (ROWS, 0, VOCAB)
    assert fresh.state is None


def test_one_token(model: Model):
    assert_close(model.plain(TOKENS[:, :1]), model.plain(TOKENS)[:, :1], FORWARD)


def test_overrun_of_max_len_is_nan_for_its_row_only(model: Model):
    """Each part is a document of its own, none of which is long."""
    real = np.ones((ROWS, HALF), np.int32)
    real[[0, 2], [4, 0]] = 0
    state, logits = model.fresh, []
    for number in (1, 2, 3, 4):
        ids = number * (real if number != 3 else np.array([[1] * 3 + [0] * 2] * ROWS))
        out = model.half(TOKENS[:, :HALF], ids, state)
        state = out.state
        logits.append(out.logits)
    assert np.all(np.isfinite(logits[:3]))
    bad = np.isnan(logits[3])
    assert not bad[[0, 2]].any()
    assert bad[1].all()


def test_explicit_positions_are_used(model: Model):
    counted = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)
    same, shifted = (model.placed(TOKENS, places) for places in (counted, counted + 1))
    np.testing.assert_array_equal(same, model.plain(TOKENS))
    learned = model.model.config.positions == "learned"
    assert np.array_equal(shifted, same) == (not learned)


@pytest.mark.parametrize(
    "mixer",
    [
        TwoMambaConfig(num_heads=2, rope="half"),
        TwoMambaConfig(num_heads=2, rope="pairs", kernel="exp"),
        RootOrdersConfig(num_heads=2),
        SoftmaxStateConfig(num_heads=2, of="output"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_angles_of_plain_rows_are_computed_once_for_all(mixer: Any, packed: bool):
    config = dataclasses.replace(small("gpt"), mixer=mixer, positions="none", depth=1)
    graph, params = abstract(config)
    ids = ONE if packed else None

    def run(params: Any, tokens: jax.Array, ids: jax.Array | None) -> jax.Array:
        return nnx.merge(graph, params)(tokens, segment_ids=ids).logits

    found = str(jax.make_jaxpr(run)(params, TOKENS, ids))
    shapes = set(re.findall(r":f32\[([\d,]+)\] = cos ", found))
    rows = f"{TOKENS.shape[0]}," if packed else ""
    assert shapes
    assert all(shape.startswith(f"{rows}{LENGTH},1,") for shape in shapes)


def test_only_learned_positions_bound_a_row(model: Model):
    run = partial(nnx.eval_shape, lambda: model.model(jnp.zeros((1, 13), jnp.int32)).logits)
    if model.model.position is None:
        assert run().shape == (1, 13, VOCAB)
        return
    with pytest.raises(ShapeError, match=r"13 tokens .* 12 learned positions.*context_len"):
        run()


def test_only_a_state_beyond_learned_positions_is_nan(model: Model):
    _, state = model.halves(TOKENS, ONE)
    more, two = TOKENS[:, :HALF], ONE[:, :HALF] * [1, 1, 0, 0, 0]
    fits, beyond = (model.half(more, ids, state).logits for ids in (two, ONE[:, :HALF]))
    assert np.all(np.isfinite(fits[:, :2]))
    if model.model.config.positions == "learned":
        assert np.all(np.isnan(beyond[:, 2:]))
    else:
        assert np.all(np.isfinite(beyond))


def test_half_precision_activations(model: Model):
    graph, _ = abstract(model.model.config, jnp.bfloat16)
    run = jax.jit(lambda p, t: (m := nnx.merge(graph, p))(t, m.init_state(ROWS))[:2])
    logits, state = jax.device_get(run(model.params, TOKENS))
    assert logits.dtype == jnp.float32
    widths = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert "bfloat16" in widths  # caches are kept in the compute dtype
    expected = model.plain(TOKENS)
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    assert 1e-5 < error < 5 * BFLOAT16.rms  # four layers deep, each within that budget


def test_dropout_of_the_embeddings_needs_rngs():
    config = dataclasses.replace(small("gpt"), dropout=0.5)
    model = Decoder(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        m, tokens = nnx.merge(graph, params), jnp.asarray(TOKENS)
        return m(tokens).logits, m(tokens, rngs=nnx.Rngs(dropout=key)).logits

    still, one = run(params, jax.random.key(0))
    again, other = run(params, jax.random.key(1))
    np.testing.assert_array_equal(still, again)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(run(params, jax.random.key(0))[1], one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 0}, r"model\.dim=0 is not positive"),
        ({"depth": -1}, r"model\.depth=-1 is not positive"),
        ({"context_len": 0}, r"model\.context_len=0 is not positive"),
        ({"vocab_size": -5}, r"model\.vocab_size=-5"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0 is not in"),
        ({"norm_eps": 0.0}, r"model\.norm_eps=0\.0 is not a positive number\. Use 1e-5"),
        ({"norm_eps": math.nan}, r"model\.norm_eps=nan is not a positive number"),
        (
            {"norm_type": "rms", "use_bias": True},
            r"model\.use_bias=True with model\.norm_type='rms'.*model\.use_bias=False",
        ),
        (
            {"mixer": ContextualMemoryConfig(num_heads=3)},
            r"model\.mixer\.num_heads=3 does not divide model\.dim=16\. Use one of 1, 2, 4, 8",
        ),
        (
            {"feed_forward": PersistentMemoryConfig(num_heads=5)},
            r"model\.feed_forward\.num_heads=5 does not divide model\.dim=16",
        ),
        (
            {"feed_forward": PersistentMemoryConfig(num_heads=2, memory_size=0)},
            r"model\.feed_forward\.memory_size=0",
        ),
        ({"feed_forward": MLPConfig(hidden_mult=0)}, r"model\.feed_forward\.hidden_mult=0"),
        (
            {"mixer": ContextualMemoryConfig(num_heads=2, value_kernel_size=5)},
            r"model\.mixer\.value_kernel_size=5 with model\.mixer\.value_extractor='mix'",
        ),
        (
            {"feed_forward": PersistentMemoryConfig(num_heads=2, key_kernel_size=0)},
            r"model\.feed_forward\.key_kernel_size=0",
        ),
        (
            {"mixer": ContextualMemoryConfig(num_heads=2, scale_limit=math.nan)},
            r"model\.mixer\.scale_limit=nan is not positive",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configs_that_make_no_sense(change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(small("mosaic"), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_type": "batch"}, r"model\.norm_type='batch'\. Use one of layer, rms"),
        ({"init": "zeros"}, r"model\.init='zeros'\. Use one of gpt2, fan_in, depth_scaled, uni"),
    ],
    ids=["norm_type", "init"],
)
def test_norm_and_init_must_be_known(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(small("gpt"), **change)


def test_an_extractor_must_be_known():
    mixer = ContextualMemoryConfig(num_heads=2)
    # Past the type check of the tests, as a user's code without one would do.
    object.__setattr__(mixer, "key_extractor", "convolve")
    with pytest.raises(ConfigError, match=r"key_extractor='convolve'\. Use one of conv, mix"):
        mixer.check(16, "model.mixer")


def test_chunks_of_no_tokens_make_no_sense():
    with pytest.raises(ConfigError, match="chunk_size=0"):
        ContextualMemoryConfig(chunk_size=0)


def test_a_vocabulary_must_be_known():
    config = dataclasses.replace(small("gpt"), vocab_size=0)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 0.*tokenizer"):
        Decoder(config, rngs=nnx.Rngs(0))


def scored(config: DecoderConfig, params: Any, key: jax.Array | None) -> jax.Array:
    """A number that depends on all logits."""
    model = nnx.merge(abstract(config)[0], params)
    rngs = None if key is None else nnx.Rngs(dropout=key)
    logits = model(jnp.asarray(TOKENS), rngs=rngs).logits
    return jnp.sum(logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape))


def test_rematerialised_blocks_give_the_same_gradients():
    """Also with dropout, whose masks are drawn again in the backward pass."""
    plain = dataclasses.replace(small("mosaic"), depth=1)
    plain = dataclasses.replace(plain, mixer=dataclasses.replace(plain.mixer, dropout=0.3))
    forgetful = dataclasses.replace(plain, remat=True)
    params = nnx.state(Decoder(plain, rngs=nnx.Rngs(0)), nnx.Param)
    traced = [
        jax.jit(jax.grad(lambda p, c=c: scored(c, p, jax.random.key(5)))).trace(params)
        for c in (plain, forgetful)
    ]
    kept, again = (trace.lower().compile()(params) for trace in traced)
    assert_close(again, kept, GRADIENT)
    # Attention checkpoints its tiles by itself: each block adds one of its own.
    text = [str(trace.jaxpr) for trace in traced]
    counts = [t.count("remat") + t.count("checkpoint") for t in text]
    assert counts[1] > counts[0]


def test_the_parts_of_the_library_compute_their_equations():
    """Untied head, scaled logits, norms on the stream, blocks of one slot."""
    config = dataclasses.replace(
        small("convolutions"), feed_forward=None, norm="post", tie_embedding=False
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert [len(slots) for slots in model.init_state(3).blocks] == [1, 1]

    @jax.jit
    def run(m: Decoder, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        x = m.embedding(tokens)
        for block in m.blocks:
            x = block.norm_1(x)
            x = x + block.mixer(x).y
        expected = m.norm(x) @ m.head.table[...].T / math.sqrt(config.dim)
        return expected, [m(tokens).logits, m(tokens, m.init_state(3)).logits]

    expected, ways = run(model, TOKENS)
    for logits in ways:
        assert_close(logits, expected, FORWARD)


def test_values_of_length_zero_leave_loss_and_gradients_finite():
    """With all shares at 0 the last value of each row is 0/0 in the authors' code."""
    config = dataclasses.replace(small("library"), depth=1)
    model = Decoder(config, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.mixer.value.mix[...] = jnp.zeros(2)
    params = nnx.state(model, nnx.Param)
    value, grads = jax.jit(jax.value_and_grad(lambda p: scored(config, p, None)))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in [value, *jax.tree.leaves(grads)])
