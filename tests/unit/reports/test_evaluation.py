"""Evaluation: against a loop by hand, its interval against simulation, bits per byte."""

import numpy as np
import pytest
from flax import nnx

from jaxmem.data.config import DataConfig
from jaxmem.data.pipeline import load_corpus
from jaxmem.reports.evaluation import evaluate, margin
from tests.unit.generate.stand_in import StandIn, StandInConfig

CONTEXT = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["ab", "cé", "d€", "e "], 300)
    path.write_text("".join(words), encoding="utf-8")
    return load_corpus(DataConfig(path=str(path)))


compute = nnx.jit(lambda model, tokens: model(tokens).logits)


@pytest.mark.parametrize("skip", [0, 3])
def test_equals_a_loop_over_windows(corpus, skip):
    config = StandInConfig(context_len=CONTEXT, vocab_size=corpus.tokenizer.vocab_size)
    model = StandIn(config)
    found = evaluate(
        model, corpus, "validation", context_len=CONTEXT, batch_size=3, skip_tokens=skip
    )
    tokens = corpus.tokens("validation").astype(np.int32)
    losses = []
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1]
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logits = np.float64(compute(model, padded))[0, : len(window) - 1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-logits[np.arange(len(window) - 1), window[1:]][skip:])
    every = np.concatenate(losses)
    assert found.tokens == len(every)
    assert (len(every) == len(tokens) - 1) == (skip == 0)
    assert found.windows == sum(len(window) > 0 for window in losses)
    assert len(losses) % 3  # the last batch is not full
    assert len(losses[-1]) < CONTEXT - skip  # nor the last window
    assert found.loss == pytest.approx(every.mean(), rel=1e-6)

    measures = found.to_dict()
    text = corpus.tokenizer.decode(tokens[1:])
    assert measures["perplexity"] == pytest.approx(np.exp(every.mean()), rel=1e-5)
    assert measures["bits_per_character"] == pytest.approx(measures["bits_per_token"])
    size = len(text.encode("utf-8"))
    assert size > len(text)
    bits = every.mean() * (len(tokens) - 1) / np.log(2)
    assert measures["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    low, high = measures["loss_ci95"]
    assert (low + high) / 2 == pytest.approx(found.loss)
    assert measures["perplexity_ci95"] == pytest.approx([np.exp(low), np.exp(high)])


def test_interval_covers_the_mean_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        counts = rng.integers(4, 9, 60)
        sums = rng.normal(2.0 * counts, np.sqrt(counts))
        covered += abs(sums.sum() / counts.sum() - 2.0) < margin(sums, counts)
    # 60 windows under-cover by half a point; 0.7 points is one deviation of 1000 trials.
    assert 925 <= covered <= 970


def test_one_window_has_no_interval(corpus):
    assert margin(np.ones(1), np.ones(1)) is None
    config = StandInConfig(context_len=500, vocab_size=corpus.tokenizer.vocab_size)
    found = evaluate(StandIn(config), corpus, "validation", context_len=500, batch_size=1)
    assert found.windows == 1
    assert not [name for name in found.to_dict() if name.endswith("ci95")]


def test_unknown_text_has_no_bits_per_byte(corpus, monkeypatch):
    monkeypatch.setattr("jaxmem.reports.evaluation.MOST_TOKENS_TO_DECODE", 10)
    config = StandInConfig(context_len=CONTEXT, vocab_size=corpus.tokenizer.vocab_size)
    model = StandIn(config)
    found = evaluate(model, corpus, "validation", context_len=CONTEXT, batch_size=3).to_dict()
    assert "bits_per_token" in found
    assert not {"bits_per_byte", "bits_per_byte_ci95", "bits_per_character"} & found.keys()
