"""In-context language learning: the metrics by hand, the batches, and what does not fit."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.automata import PAD, SEPARATOR, VOCABULARY, PromptShape, language_hash
from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError
from jaxmem.tasks.in_context import InContextConfig, legality_sums
from tests.helpers.tiny_run import TINY_MODEL

CONFIG = InContextConfig(
    automata=30,
    test_prompts=10,
    max_nodes=3,
    prompt=PromptShape(min_strings=2, max_strings=3, max_length=3),
)
DATA = DataConfig(batch_size=4)


def opened(**changes):
    return dataclasses.replace(CONFIG, **changes).open(TINY_MODEL, DATA)


def batches(task, split="train", *, batch_size=4, seed=0, process_index=0, process_count=1):
    return task.batches(
        split,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def logits_of(*rows):
    """Logits whose softmax over the symbols gives these probabilities, separators huge."""
    out = np.full((1, len(rows), VOCABULARY), -np.inf, np.float32)
    out[..., SEPARATOR], out[..., PAD] = 50.0, 60.0  # must not count
    for position, row in enumerate(rows):
        for symbol, probability in row.items():
            out[0, position, symbol] = np.log(probability) + position  # softmax forgets a shift
    return out


def test_accuracy_and_distance_by_hand():
    logits = logits_of(
        {0: 0.5, 1: 0.5},  # legal {0, 1}: exact
        {0: 0.7, 2: 0.3},  # legal {0, 1}: likeliest is legal, ½(0.2 + 0.5 + 0.3) = 0.5
        {3: 1.0},  # legal {17}: wrong, distance 1
        {5: 0.75, 17: 0.25},  # legal {17}: wrong, ½(0.75 + 0.75)
        {3: 1.0},  # padding
    )
    legal = np.array([[0b11, 0b11, 1 << 17, 1 << 17, 0]], np.int32)
    right, distance = jax.jit(legality_sums)(logits, legal)
    assert right == 2
    np.testing.assert_allclose(distance, 0 + 0.5 + 1 + 0.75, rtol=1e-6)
    half = jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16)
    assert jax.eval_shape(legality_sums, half, legal)[1].dtype == jnp.float32


def test_loss_counts_real_tokens_and_metrics_are_means_over_them():
    task = opened()
    batch = next(batches(task, "validation"))
    seen = []

    def model(tokens, *, rngs):
        seen.append(rngs)
        return SimpleNamespace(logits=jnp.zeros((*tokens.shape, VOCABULARY)), aux={"a": 1.0})

    out = jax.jit(lambda batch: task.loss(model, batch))(batch)
    assert seen == [None]
    real = batch["targets"] >= 0
    assert out.count == real.sum() < real.size
    np.testing.assert_allclose(out.total, real.sum() * np.log(VOCABULARY), rtol=1e-6)
    # Equal logits: the likeliest symbol is 0, and ½ Σ |1/18 - p| = 1 - legal / 18.
    sets = batch["legal"][real]
    number = np.array([bin(bits).count("1") for bits in sets])
    np.testing.assert_allclose(out.aux["accuracy"], np.mean(sets & 1), rtol=1e-6)
    np.testing.assert_allclose(out.aux["tvd"], np.mean(1 - number / 18), rtol=1e-6)
    assert out.aux["a"] == 1.0


def test_targets_are_the_next_tokens_and_padding_is_not_scored():
    task = opened()
    batch = next(batches(task))
    assert {rows.shape for rows in batch.values()} == {(4, 8)}
    assert {rows.dtype for rows in batch.values()} == {np.dtype(np.int32)}
    tokens, targets, legal = batch["tokens"], batch["targets"], batch["legal"]
    np.testing.assert_array_equal(targets[:, :-1], np.where(tokens == PAD, -1, tokens)[:, 1:])
    np.testing.assert_array_equal(legal > 0, targets >= 0)
    symbols = (targets >= 0) & (targets < SEPARATOR)
    assert ((legal >> np.maximum(targets, 0)) & 1)[symbols].all()


def test_validation_goes_round_prompts_of_other_automata():
    task = opened()
    hashes = {split: set(language_hash(task.automata[split], 6)) for split in task.automata}
    assert not hashes["train"] & hashes["validation"]
    for seed in (1, 2):  # whatever the run's seed
        drawn = batches(task, "validation", seed=seed)
        rows = np.concatenate([next(drawn)["tokens"] for _ in range(5)])
        np.testing.assert_array_equal(rows, np.tile(task.test_prompts.tokens[:, :-1], (2, 1)))
    larger = opened(automata=40)
    np.testing.assert_array_equal(larger.test_prompts.tokens, task.test_prompts.tokens)


def test_training_batches_depend_on_seed_and_number_and_can_be_resumed():
    task = opened()
    first, second, other = (batches(task, seed=seed) for seed in (3, 3, 4))
    started = [next(first)["tokens"] for _ in range(3)]
    assert not np.array_equal(started[0], started[1])
    assert not np.array_equal(started[0], next(other)["tokens"])
    state = first.get_state()
    second.set_state(state)
    np.testing.assert_array_equal(next(first)["legal"], next(second)["legal"])


def test_processes_share_a_batch():
    task = opened()
    whole = next(batches(task))["tokens"]
    for process in range(2):
        part = next(batches(task, process_index=process, process_count=2))["tokens"]
        np.testing.assert_array_equal(part, whole[process::2])


def test_fingerprint_is_that_of_the_data():
    assert opened().fingerprint == opened().fingerprint
    assert len({opened(seed=s, automata=a).fingerprint for s in (0, 1) for a in (29, 30)}) == 4


def test_the_log_says_what_is_learnt():
    text = "\n".join(opened().lines())
    for words in ("30 random automata of 2 to 3 nodes", "10 prompts of others", "cut at 8", "%"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"automata": 0}, r"task\.automata=0"),
        ({"test_prompts": 0}, r"task\.test_prompts=0"),
        ({"max_nodes": 1}, r"task\.max_nodes=1"),
    ],
)
def test_sizes_are_checked(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_a_text_or_a_smaller_vocabulary_does_not_fit():
    with pytest.raises(ConfigError, match=r"'in_context'.*data\.path=a\.txt.*data\.batch_size"):
        CONFIG.check(TINY_MODEL, DataConfig(path="a.txt"))
    CONFIG.check(TINY_MODEL, DATA)
    small = dataclasses.replace(TINY_MODEL, vocab_size=19)
    with pytest.raises(ConfigError, match=r"vocab_size=19.*task's 20"):
        CONFIG.open(small, DATA)
    assert CONFIG.open(TINY_MODEL, DATA).model.vocab_size == 20
