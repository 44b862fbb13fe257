"""The decoder: its size, its start, and its ways to run, for a Memory Mosaic and its GPT twin."""

import dataclasses
import math
import re
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

LENGTH, VOCAB = 10, 11
# Documents of 4 and 3 tokens, padding before, between and after them.
PACKED = np.array([0, 1, 1, 1, 0, 1, 2, 2, 2, 0])


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
    return config_of(kind, heads=2, memory=12, vocab_size=VOCAB, context_len=12, dim=16, depth=2)


class Model:
    """A decoder with parameters of order 1, as a pure function of them."""

    def __init__(self, kind: str, dtype: Any = jnp.float32):
        self.model = Decoder(small(kind), rngs=nnx.Rngs(0), compute_dtype=dtype)
        self.graph, start = nnx.split(self.model, nnx.Param)
        leaves, tree = jax.tree.flatten(start)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        self.params = jax.tree.unflatten(
            tree,
            [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)],
        )

    def call(self, run: Any, *args: Any) -> Any:
        return jax.jit(lambda p, *a: run(nnx.merge(self.graph, p), *a))(self.params, *args)


@pytest.fixture(scope="module", params=["mosaic", "gpt"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


TOKENS = jax.random.randint(jax.random.key(2), (3, LENGTH), 0, VOCAB)


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
    shapes = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("kind", ["mosaic", "gpt"])
def test_a_model_holds_nothing_but_float32_parameters(kind: str):
    model = Decoder(small(kind), rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16)
    _, params, rest = nnx.split(model, nnx.Param, ...)
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
        assert float(jnp.std(leaf[...])) == pytest.approx(spread, rel=tolerance), leaf.shape


def test_layers_and_seeds_start_differently():
    def first(seed: int) -> list[np.ndarray]:
        model = Decoder(small("mosaic"), rngs=nnx.Rngs(seed))
        return [np.asarray(b.mixer.out.kernel[...]) for b in model.blocks]

    zero, one = first(0), first(1)
    np.testing.assert_array_equal(zero, first(0))
    assert not np.allclose(zero[0], zero[1])
    assert not np.allclose(zero[0], one[0])


def test_forms_agree(model: Model):
    def run(m: Decoder, tokens: jax.Array) -> Any:
        whole = m(tokens, m.init_state(3))
        plain = m(tokens)
        chunked = m(tokens, m.init_state(3), form="chunked")
        cut = m(tokens[:, :3], m.init_state(3))
        rest = m(tokens[:, 3:], cut.state)
        split = (jnp.concatenate([cut.logits, rest.logits], axis=1), rest.state)

        def body(state: DecoderState, token: jax.Array) -> tuple[DecoderState, jax.Array]:
            out = m.step(token, state)
            return out.state, out.logits

        end, logits = jax.lax.scan(body, m.init_state(3), tokens.T)
        stepped = (jnp.moveaxis(logits, 1, 0), end)
        return plain.logits, whole[:2], chunked[:2], split, stepped

    plain, whole, *others = model.call(run, TOKENS)
    assert plain.shape == (3, LENGTH, VOCAB)
    assert float(jnp.std(plain)) > 0.05
    assert_close(whole[0], plain, FORWARD)
    for other in others:
        assert_close(other, whole, FORWARD)
    np.testing.assert_array_equal(whole[1].position, LENGTH)


def test_no_state_in_none_out(model: Model):
    out = nnx.eval_shape(lambda: model.model(TOKENS))
    assert out.state is None
    assert out.aux == {}
    assert out.logits.dtype == jnp.float32


def test_packed_documents_equal_documents_alone(model: Model):
    """With learned positions this needs positions that start anew with each document."""
    ids = jnp.broadcast_to(jnp.asarray(PACKED), TOKENS.shape)

    def run(m: Decoder, tokens: jax.Array) -> Any:
        alone = [m(tokens[:, np.flatnonzero(n == PACKED)]).logits for n in (1, 2)]
        plain = m(tokens, segment_ids=ids).logits
        with_state = m(tokens, m.init_state(3), segment_ids=ids).logits
        first = m(tokens[:, :5], m.init_state(3), segment_ids=ids[:, :5])
        second = m(tokens[:, 5:], first.state, segment_ids=ids[:, 5:])
        split = jnp.concatenate([first.logits, second.logits], axis=1)
        return alone, (plain, with_state, split)

    alone, ways = model.call(run, TOKENS)
    for packed in ways:
        assert bool(jnp.all(jnp.isfinite(packed)))
        for number, expected in zip((1, 2), alone, strict=True):
            assert_close(packed[:, np.flatnonzero(number == PACKED)], expected, FORWARD)


def test_rows_of_uneven_length_go_on_as_rows_alone(model: Model):
    ids = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1]])

    def run(m: Decoder, tokens: jax.Array) -> Any:
        prompts = m(tokens[:2, :4], m.init_state(2), segment_ids=ids)
        together = m.step(tokens[:2, 7], prompts.state)
        alone = m(jnp.concatenate([tokens[:1, :2], tokens[:1, 7:8]], axis=1)).logits
        return together, alone[:, -1]

    together, alone = model.call(run, TOKENS)
    assert_close(together.logits[:1], alone, FORWARD)
    np.testing.assert_array_equal(together.state.position, [3, 5])


def test_a_padded_step_changes_nothing(model: Model):
    def run(m: Decoder, tokens: jax.Array) -> Any:
        before = m(tokens[:, :3], m.init_state(3)).state
        return before, m.step(tokens[:, 3], before, segment_ids=jnp.array([1, 0, 1]))

    before, out = model.call(run, TOKENS)
    row = lambda state: jax.tree.map(lambda leaf: leaf[1], state)  # noqa: E731
    assert_close(row(out.state), row(before), FORWARD)
    np.testing.assert_array_equal(out.state.position, [4, 3, 4])
    assert bool(jnp.all(jnp.isfinite(out.logits)))


@pytest.mark.parametrize("packed", [False, True])
def test_no_token_changes_nothing(model: Model, packed: bool):
    def run(m: Decoder, tokens: jax.Array) -> Any:
        before = m(tokens, m.init_state(3)).state
        ids = jnp.ones((3, 0), jnp.int32) if packed else None
        return before, m(tokens[:, :0], before, segment_ids=ids), m(tokens[:, :0])

    before, out, fresh = model.call(run, TOKENS)
    assert out.logits.shape == fresh.logits.shape == (3, 0, VOCAB)
    assert fresh.state is None
    jax.tree.map(np.testing.assert_array_equal, out.state, before)


def test_one_token(model: Model):
    def run(m: Decoder, tokens: jax.Array) -> Any:
        return m(tokens[:, :1]).logits, m(tokens).logits[:, :1]

    one, of_many = model.call(run, TOKENS)
    assert_close(one, of_many, FORWARD)


def test_overrun_of_max_len_is_nan_for_its_row_only(model: Model):
    ids = jnp.asarray([[1] * 4 + [0], [1] * 5, [0] + [1] * 4])

    def run(m: Decoder, tokens: jax.Array) -> jax.Array:
        return m(tokens[:, :5], m.init_state(3, max_len=4), segment_ids=ids).logits

    bad = np.isnan(model.call(run, TOKENS))
    assert not bad[[0, 2]].any()
    assert bad[1].all()


def test_explicit_positions_are_used(model: Model):
    def run(m: Decoder, tokens: jax.Array) -> Any:
        counted = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        return [m(tokens, positions=p).logits for p in (None, counted, counted + 1)]

    none, same, shifted = model.call(run, TOKENS)
    np.testing.assert_array_equal(same, none)
    learned = model.model.config.positions == "learned"
    assert np.array_equal(shifted, none) == (not learned)


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
    model = Decoder(config, rngs=nnx.Rngs(0))
    ids = jnp.ones(TOKENS.shape, jnp.int32) if packed else None
    found = str(jax.make_jaxpr(lambda tokens: model(tokens, segment_ids=ids).logits)(TOKENS))
    shapes = set(re.findall(r":f32\[([\d,]+)\] = cos ", found))
    rows = f"{TOKENS.shape[0]}," if packed else ""
    assert shapes
    assert all(shape.startswith(f"{rows}{LENGTH},1,") for shape in shapes)


def test_a_row_beyond_the_learned_positions_is_an_error():
    model = Decoder(small("gpt"), rngs=nnx.Rngs(0))
    with pytest.raises(ShapeError, match=r"13 tokens .* 12 learned positions.*context_len"):
        model(jnp.zeros((1, 13), jnp.int32))


def test_a_state_beyond_the_learned_positions_is_nan():
    def run(m: Decoder, tokens: jax.Array) -> Any:
        first = m(tokens, m.init_state(3, max_len=20))
        return m(tokens[:, :2], first.state).logits, m(tokens[:, :3], first.state).logits

    fits, beyond = Model("gpt").call(run, TOKENS)
    assert bool(jnp.all(jnp.isfinite(fits)))
    assert bool(jnp.all(jnp.isnan(beyond[:, 2])))


def test_a_model_without_positions_has_no_longest_row():
    tokens = jnp.zeros((1, 20), jnp.int32)
    out = Model("mosaic").call(lambda m, t: m(t).logits, tokens)
    assert bool(jnp.all(jnp.isfinite(out)))


@pytest.mark.parametrize("kind", ["mosaic", "gpt"])
def test_half_precision_activations(kind: str):
    narrow, wide = Model(kind, jnp.bfloat16), Model(kind)
    run = lambda m, t: m(t, m.init_state(3))[:2]  # noqa: E731
    logits, state = narrow.call(run, TOKENS)
    assert logits.dtype == jnp.float32
    widths = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert "bfloat16" in widths  # caches are kept in the compute dtype
    expected, _ = wide.call(run, TOKENS)
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 1e-5 < error < 5 * BFLOAT16.rms  # four layers deep, each within that budget


def test_dropout_of_the_embeddings_needs_rngs():
    config = dataclasses.replace(small("gpt"), dropout=0.5)
    model = Decoder(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params: Any, key: jax.Array) -> Any:
        m = nnx.merge(graph, params)
        return m(TOKENS).logits, m(TOKENS, rngs=nnx.Rngs(dropout=key)).logits

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
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    model = nnx.merge(graph, params)
    rngs = None if key is None else nnx.Rngs(dropout=key)
    logits = model(TOKENS, rngs=rngs).logits
    return jnp.sum(logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape))


def test_rematerialised_blocks_give_the_same_gradients():
    """Also with dropout, whose masks are drawn again in the backward pass."""
    plain = small("mosaic")
    plain = dataclasses.replace(plain, mixer=dataclasses.replace(plain.mixer, dropout=0.3))
    forgetful = dataclasses.replace(plain, remat=True)
    params = nnx.state(Decoder(plain, rngs=nnx.Rngs(0)), nnx.Param)
    grads = [jax.grad(lambda p, c=c: scored(c, p, jax.random.key(5))) for c in (plain, forgetful)]
    kept, again = (jax.jit(grad)(params) for grad in grads)
    assert_close(again, kept, GRADIENT)
    # Attention checkpoints its tiles by itself: each block adds one of its own.
    text = [str(jax.make_jaxpr(grad)(params)) for grad in grads]
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
    def run(m: Decoder) -> tuple[jax.Array, list[jax.Array]]:
        x = m.embedding(TOKENS)
        for block in m.blocks:
            x = block.norm_1(x)
            x = x + block.mixer(x).y
        expected = m.norm(x) @ m.head.table[...].T / math.sqrt(config.dim)
        return expected, [m(TOKENS).logits, m(TOKENS, m.init_state(3)).logits]

    expected, ways = run(model)
    for logits in ways:
        assert_close(logits, expected, FORWARD)


def test_values_of_length_zero_leave_loss_and_gradients_finite():
    """With all shares at 0 the last value of each row is 0/0 in the authors' code."""
    config = small("library")
    model = Decoder(config, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.mixer.value.mix[...] = jnp.zeros(2)
    params = nnx.state(model, nnx.Param)
    value, grads = jax.jit(jax.value_and_grad(lambda p: scored(config, p, None)))(params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in [value, *jax.tree.leaves(grads)])
