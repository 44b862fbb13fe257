"""The engine: state against recomputation, rows against themselves alone, restarts, stops."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError, NonFiniteLoss
from jaxmem.generate import engine
from jaxmem.generate.engine import generate
from jaxmem.generate.prefill import pad
from jaxmem.generate.sampling import Sampling
from tests.unit.generate.stand_in import StandIn, StandInConfig

GREEDY, RANDOM = Sampling(temperature=0), Sampling(temperature=1.0, top_k=6)
KEY = jax.random.key(5)
PROMPTS = [[3], [1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5], [0, 1] * 10]


@pytest.fixture(scope="module")
def model():
    return StandIn(StandInConfig())


@pytest.fixture(scope="module")
def likeliest(model):
    """The likeliest token after a window, by a pass over all of it."""
    logits = jax.jit(lambda tokens: model(tokens).logits)

    def compute(window):
        padded = np.zeros((1, model.config.context_len), np.int32)
        padded[0, : len(window)] = window
        return int(np.argmax(logits(padded)[0, len(window) - 1]))

    return compute


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_state_equals_recomputation_past_several_restarts(model, sampling):
    kwargs = {"max_new_tokens": 40, "sampling": sampling, "key": KEY}
    fast = generate(model, PROMPTS, **kwargs)
    assert lists(fast) == lists(generate(model, PROMPTS, use_cache=False, **kwargs))
    assert [len(row) for row in fast] == [40] * 4
    assert len({tuple(row) for row in fast}) == 4


def test_every_row_equals_itself_alone(model):
    kwargs = {"max_new_tokens": 40, "sampling": RANDOM, "key": KEY}
    together = lists(generate(model, PROMPTS, **kwargs))
    for r, prompt in enumerate(PROMPTS):
        assert lists(generate(model, [prompt], rows=[r], **kwargs)) == [together[r]]
    # The same prompt in another row has another stream.
    assert lists(generate(model, [PROMPTS[0]], rows=[1], **kwargs)) != [together[0]]


def test_restart_rule_spelt_out(model, likeliest):
    """Greedy by hand: a full window is replaced by its last half, the new token included."""
    half = model.config.context_len // 2
    window, expected = list(PROMPTS[3][-half:]), []
    text = list(PROMPTS[3])
    for _ in range(20):
        token = likeliest(window)
        expected.append(token)
        text.append(token)
        window = text[-half:] if len(window) == model.config.context_len else [*window, token]
    found = generate(model, [PROMPTS[3]], max_new_tokens=20, sampling=GREEDY, key=KEY)
    assert lists(found) == [expected]


def test_a_prompt_of_exactly_the_context_is_kept_whole(model, likeliest):
    prompt = PROMPTS[2]
    assert len(prompt) == model.config.context_len
    found = generate(model, [prompt], max_new_tokens=1, sampling=GREEDY, key=KEY)
    assert found[0][0] == likeliest(prompt)


def test_long_prefill_in_several_chunks():
    model = StandIn(StandInConfig(context_len=700), seed=1)
    prompts = [np.random.default_rng(r).integers(0, 11, n) for r, n in enumerate([600, 3, 256])]
    kwargs = {"max_new_tokens": 3, "sampling": GREEDY, "key": KEY}
    tokens, _ = pad([p.tolist() for p in prompts], 700)
    assert tokens.shape == (4, 3, 256)
    fast = generate(model, prompts, **kwargs)
    assert lists(fast) == lists(generate(model, prompts, use_cache=False, **kwargs))


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_tokens_end_a_row_and_are_left_out(model, use_cache):
    kwargs = {"max_new_tokens": 30, "sampling": RANDOM, "key": KEY, "use_cache": use_cache}
    free = lists(generate(model, PROMPTS, **kwargs))
    stop = free[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert lists(generate(model, PROMPTS, stop_tokens=[stop], **kwargs)) == expected


def test_rows_that_stop_at_different_times_equal_themselves_alone(model):
    kwargs = {"max_new_tokens": 30, "sampling": RANDOM, "key": KEY}
    free = lists(generate(model, PROMPTS, **kwargs))
    stops = [free[1][1]]
    together = lists(generate(model, PROMPTS, stop_tokens=stops, **kwargs))
    assert len({len(row) for row in together}) == 4
    for r, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], rows=[r], stop_tokens=stops, **kwargs)
        assert lists(alone) == [together[r]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_callback_sees_all_tokens_and_may_finish_a_row(model, use_cache):
    seen = [[], [], [], []]

    def collect(new):
        for row, tokens in zip(seen, new, strict=True):
            row.extend(tokens.tolist())
        return [2]

    kwargs = {"max_new_tokens": 70, "sampling": RANDOM, "key": KEY, "use_cache": use_cache}
    rows = generate(model, PROMPTS, on_tokens=collect, **kwargs)
    assert seen == lists(rows)
    assert [len(r) for r in (rows[0], rows[1], rows[3])] == [70] * 3
    free = generate(model, PROMPTS, **kwargs)
    assert len(rows[2]) < 70
    assert rows[2].tolist() == free[2][: len(rows[2])].tolist()


def test_padded_vocabulary_is_never_drawn(model):
    kwargs = {"max_new_tokens": 60, "sampling": Sampling(temperature=5.0), "key": KEY}
    assert max(map(max, generate(model, PROMPTS, **kwargs))) == 10
    assert max(map(max, generate(model, PROMPTS, num_tokens=7, **kwargs))) == 6


def test_split_model_and_few_compilations(model):
    kwargs = {"sampling": RANDOM, "key": KEY}
    engine._decode_block.clear_cache()
    first = generate(nnx.split(model), [PROMPTS[1]], max_new_tokens=40, **kwargs)
    again = generate(model, [PROMPTS[1]], max_new_tokens=50, **kwargs)
    assert first[0].tolist() == again[0][:40].tolist()
    assert engine._decode_block._cache_size() == 1


def test_nothing_to_generate(model):
    assert lists(generate(model, [[1]], max_new_tokens=0, sampling=GREEDY, key=KEY)) == [[]]


@pytest.mark.parametrize("prompts", [[], [[1], []]], ids=["none", "empty"])
def test_empty_prompts_are_refused(model, prompts):
    with pytest.raises(ConfigError, match="empty prompt"):
        generate(model, prompts, max_new_tokens=1, sampling=GREEDY, key=KEY)


@pytest.mark.parametrize("use_cache", [True, False])
def test_nan_logits_stop_generation(use_cache):
    model = StandIn(StandInConfig())
    embed = np.array(model.embed[...])
    embed[4] = np.nan
    model.embed[...] = embed
    with pytest.raises(NonFiniteLoss, match=r"NaN in rows \[1\]"):
        generate(model, [[3], [4]], max_new_tokens=1, sampling=GREEDY, key=KEY, use_cache=use_cache)
