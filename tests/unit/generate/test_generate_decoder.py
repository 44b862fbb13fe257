"""Generation with the real decoders: state against recomputation, rows against themselves."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.errors import ConfigError
from jaxmem.generate.beam import beam_search
from jaxmem.generate.engine import generate
from jaxmem.generate.prefill import with_context
from jaxmem.generate.sampling import Sampling, sample
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig
from tests.helpers.drawn import drawn

KEY = jax.random.key(2)
PROMPTS = [[3], [1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8, 1, 8], [0, 1] * 9]
SIZES = {"vocab_size": 13, "context_len": 10, "dim": 16, "depth": 1}
CONFIGS = {
    "mosaic": DecoderConfig(
        mixer=ContextualMemoryConfig(num_heads=2),
        feed_forward=PersistentMemoryConfig(num_heads=2, memory_size=24),
        **SIZES,
    ),
    "gpt": DecoderConfig(
        mixer=AttentionConfig(num_heads=2),
        feed_forward=MLPConfig(),
        positions="learned",
        **SIZES,
    ),
}


RANDOM = Sampling()


def build(config):
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed=1)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param])


forward = nnx.jit(lambda decoder, tokens: decoder(tokens).logits)


def test_state_equals_recomputation_past_restarts(model):
    """The likeliest token instead of a drawn one makes no difference to the model's part."""
    kwargs = {"max_new_tokens": 40, "sampling": RANDOM, "key": KEY}
    fast = [row.tolist() for row in generate(model, PROMPTS, **kwargs)]
    slow = [row.tolist() for row in generate(model, PROMPTS, use_cache=False, **kwargs)]
    assert fast == slow
    assert len({token for row in fast for token in row}) > 3


def test_a_longer_context_needs_no_restart():
    model = build(CONFIGS["mosaic"])
    longer = with_context(model, 60)
    kwargs = {"max_new_tokens": 30, "sampling": RANDOM, "key": KEY}
    (found,) = generate(longer, PROMPTS[3:], **kwargs)
    row = np.array([*PROMPTS[3], *found[:-1].tolist()])
    logits = forward(model, row[None])[0, len(PROMPTS[3]) - 1 :]  # all of it at once

    @jax.jit
    @jax.vmap
    def draw(logits, t):
        return sample(logits, jax.random.fold_in(jax.random.fold_in(KEY, 0), t), RANDOM)

    assert draw(logits, np.arange(30)).tolist() == found.tolist()
    assert model.config.context_len == 10


def test_a_context_that_cannot_be_is_refused():
    learned = build(CONFIGS["gpt"])
    assert with_context(learned, 10).config.context_len == 10
    for length, words in ((11, "10 that the model has learned"), (0, "holds nothing")):
        with pytest.raises(ConfigError, match=words):
            with_context(learned, length)


def test_every_row_equals_itself_alone(model):
    kwargs = {"max_new_tokens": 25, "sampling": RANDOM, "key": KEY}
    together = generate(model, PROMPTS, **kwargs)
    for r, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], rows=[r], **kwargs)
        assert alone[0].tolist() == together[r].tolist()


def test_beams_have_the_probability_that_a_full_pass_gives_them(model):
    prompt = PROMPTS[1]
    found = beam_search(model, prompt, beams=4, max_new_tokens=5, stop_tokens=[7])
    assert len(found) == 4
    texts = [[*prompt, *h.tokens.tolist(), *[7] * h.stopped] for h in found]
    logits = np.float64(forward(model, np.array([t + [0] * (10 - len(t)) for t in texts])))
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    for h, text, log_probs in zip(found, texts, logits, strict=True):
        wanted = sum(log_probs[i - 1, text[i]] for i in range(len(prompt), len(text)))
        np.testing.assert_allclose(h.log_prob, wanted, rtol=1e-5, atol=1e-5)
