"""Beam search: against all continuations, against a search spelt out by full passes, and errors."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError, NonFiniteLoss
from jaxmem.generate.beam import Hypothesis, beam_search
from jaxmem.generate.engine import generate
from jaxmem.generate.sampling import Sampling
from tests.unit.generate.stand_in import StandIn, StandInConfig

PROMPT = [1, 0, 2]


@pytest.fixture(scope="module")
def model():
    return StandIn(StandInConfig(vocab_size=4))


@pytest.fixture(scope="module")
def log_probs(model):
    """Log-probabilities after a prompt and some new tokens, by a pass over the whole window."""
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens).logits))
    known = {}

    def compute(prompt, new):
        window = list(prompt)
        for i in range(len(new)):
            full = len(window) == model.config.context_len
            text = [*prompt, *new[: i + 1]]
            window = text[-(model.config.context_len // 2) :] if full else [*window, new[i]]
        window = tuple(window)
        if window not in known:
            padded = np.array([window + (0,) * (model.config.context_len - len(window))])
            known[window] = np.float64(forward(padded))[0, len(window) - 1]
        return known[window]

    return compute


def log_prob_of(log_probs, prompt, tokens):
    return sum(float(log_probs(prompt, tokens[:i])[t]) for i, t in enumerate(tokens))


def exhaustive(log_probs, prompt, length, stop, power, vocabulary=4):
    """Every continuation of the prompt: those that stop, and those of full length."""
    ordinary = [t for t in range(vocabulary) if t not in stop]
    found = []
    for n in range(1, length + 1):
        for head in itertools.product(ordinary, repeat=n - 1):
            for last in range(vocabulary) if n == length else stop:
                tokens = [*head, last]
                log_prob = log_prob_of(log_probs, prompt, tokens)
                stopped = last in stop
                kept = list(head) if stopped else tokens
                found.append((log_prob / n**power, log_prob, kept, stopped))
    return sorted(found, key=lambda item: -item[0])


def spelt_out(log_probs, prompt, beams, length, stop, power):
    """The same search in plain Python, with a pass over the whole window for every token."""
    live, ended = [(0.0, [])], []
    for n in range(1, length + 1):
        longer = [
            (log_prob + float(log_probs(prompt, tokens)[t]), [*tokens, t])
            for log_prob, tokens in live
            for t in range(4)
        ]
        ended += [(lp / n**power, lp, toks[:-1], True) for lp, toks in longer if toks[-1] in stop]
        live = sorted((c for c in longer if c[1][-1] not in stop), key=lambda c: -c[0])[:beams]
    ended += [(lp / length**power, lp, tokens, False) for lp, tokens in live]
    return sorted(ended, key=lambda item: -item[0])[:beams]


def assert_found(found, wanted):
    assert [(h.tokens.tolist(), h.stopped) for h in found] == [(t, s) for _, _, t, s in wanted]
    # A likely token's log-probability is a difference of numbers near 1, hence the absolute part.
    tolerance = {"rtol": 2e-6, "atol": 5e-7}
    np.testing.assert_allclose([h.score for h in found], [w[0] for w in wanted], **tolerance)
    np.testing.assert_allclose([h.log_prob for h in found], [w[1] for w in wanted], **tolerance)


@pytest.mark.parametrize(("stop", "power"), [((), 0.0), ((3,), 0.7), ((0, 3), 1.0)], ids=str)
def test_beams_for_all_prefixes_find_the_best_of_all_continuations(model, log_probs, stop, power):
    found = beam_search(
        model, PROMPT, beams=64, max_new_tokens=4, length_power=power, stop_tokens=stop
    )
    wanted = exhaustive(log_probs, PROMPT, 4, stop, power)
    assert len(found) == min(64, len(wanted))
    assert_found(found, wanted[:64])
    if not stop:
        total = sum(math.exp(item[1]) for item in wanted)
        np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("beams", "power", "stop"),
    [(1, 0.0, ()), (2, 1.0, (0,)), (5, 0.0, (3,)), (5, 1.0, (0, 3))],
)
def test_search_is_the_one_spelt_out_past_restarts(model, log_probs, beams, power, stop):
    """A context of 12, a prompt of 10 and 30 new tokens: several restarts."""
    prompt = [3, 1, 2, 0, 1, 1, 2, 3, 0, 2]
    found = beam_search(
        model, prompt, beams=beams, max_new_tokens=30, length_power=power, stop_tokens=stop
    )
    assert_found(found, spelt_out(log_probs, prompt, beams, 30, stop, power))
    assert max(len(h.tokens) for h in found) > 3


def test_one_beam_is_greedy(model):
    sampling, key = Sampling(temperature=0), jax.random.key(0)
    (greedy,) = generate(model, [PROMPT], max_new_tokens=30, sampling=sampling, key=key)
    (found,) = beam_search(nnx.split(model), PROMPT, beams=1, max_new_tokens=30)
    assert found.tokens.tolist() == greedy.tolist()


class Scripted(nnx.Module):
    """logits depend on the last token only: p(next | last) is a table."""

    def __init__(self, table, context_len=64):
        self.config = StandInConfig(vocab_size=len(table), context_len=context_len)
        with np.errstate(divide="ignore"):
            self.table = nnx.Param(jax.device_put(np.log(np.float32(table))))

    def init_state(self, batch, *, max_len):
        del max_len
        return jnp.zeros(batch)

    def step(self, tokens, state, *, segment_ids=None):
        del segment_ids
        return StandInOutput(self.table[...][tokens], state)

    def __call__(self, tokens, state=None, *, segment_ids=None):
        del segment_ids
        return StandInOutput(self.table[...][tokens], state)


class StandInOutput:
    def __init__(self, logits, state):
        self.logits, self.state = logits, state


def test_two_beams_see_past_a_likely_first_token():
    table = [[0.0, 0.6, 0.4, 0.0], [0.3, 0.3, 0.1, 0.3], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    for beams, tokens, probability in ((1, [1, 0], 0.18), (2, [2, 3], 0.4)):
        found = beam_search(Scripted(table), [0], beams=beams, max_new_tokens=2)
        assert found[0].tokens.tolist() == tokens
        np.testing.assert_allclose(found[0].log_prob, np.log(probability), rtol=1e-6)


def test_length_power_prefers_the_longer_hypothesis():
    # From 0: stop (2) with 0.6, or 1 with 0.4, which is followed by the stop for sure.
    table = [[0.0, 0.4, 0.6], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    kwargs = {"beams": 2, "max_new_tokens": 5, "stop_tokens": [2]}
    plain = beam_search(Scripted(table), [0], **kwargs)
    assert [(h.tokens.tolist(), h.stopped) for h in plain] == [([], True), ([1], True)]
    np.testing.assert_allclose([h.log_prob for h in plain], np.log([0.6, 0.4]), rtol=1e-6)
    normed = beam_search(Scripted(table), [0], length_power=1.0, **kwargs)
    assert [h.tokens.tolist() for h in normed] == [[1], []]
    np.testing.assert_allclose(normed[0].score, np.log(0.4) / 2, rtol=1e-6)


def test_an_ended_hypothesis_outlives_likelier_unfinished_ones():
    # The stop is never among the two likeliest next tokens, yet 0.3 is the best of all in the end.
    table = [[0.36, 0.34, 0.3], [0.36, 0.34, 0.3], [0.0, 0.0, 1.0]]
    found = beam_search(Scripted(table), [0], beams=2, max_new_tokens=6, stop_tokens=[2])
    assert found[0].tokens.tolist() == []
    np.testing.assert_allclose(found[0].log_prob, np.log(0.3), rtol=1e-6)


def test_fewer_continuations_than_beams():
    table = [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    found = beam_search(Scripted(table), [0], beams=9, max_new_tokens=2, stop_tokens=[2])
    # 2 | 1 2 | 1 1
    assert [(h.tokens.tolist(), h.stopped) for h in found] == [
        ([], True),
        ([1], True),
        ([1, 1], False),
    ]


def test_padded_vocabulary_and_zero_tokens(model):
    found = beam_search(model, PROMPT, beams=4, max_new_tokens=12, num_tokens=2)
    assert {t for h in found for t in h.tokens.tolist()} <= {0, 1}
    empty = beam_search(model, PROMPT, beams=4, max_new_tokens=0)
    assert [(h.tokens.tolist(), h.log_prob) for h in empty] == [([], 0.0)]
    assert isinstance(empty[0], Hypothesis)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "empty prompt"),
        ({"beams": 0}, "beams=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"length_power": -0.5}, "length_power=-0.5"),
        ({"length_power": math.nan}, "length_power=nan"),
    ],
)
def test_numbers_outside_their_range(model, changes, words):
    options = {"prompt": PROMPT, "beams": 2, "max_new_tokens": 3} | changes
    with pytest.raises(ConfigError, match=words):
        beam_search(model, options.pop("prompt"), **options)


def test_nan_logits_stop_the_search():
    broken = StandIn(StandInConfig())
    embed = np.array(broken.embed[...])
    embed[4] = np.nan
    broken.embed[...] = embed
    with pytest.raises(NonFiniteLoss, match="logits are NaN"):
        beam_search(broken, [4], beams=2, max_new_tokens=3)
