"""Prompts that hide a pass key, rows to train on, and how answers are scored."""

import re

import numpy as np
import pytest

from jaxmem.data.needle import (
    ANSWER,
    NOT_SCORED,
    QUESTION,
    SHORTEST,
    SHORTEST_ROW,
    TOKENIZER,
    draw_prompt,
    draw_rows,
    is_right,
)
from jaxmem.errors import ConfigError


@pytest.mark.parametrize("length", [SHORTEST, SHORTEST + 1, 77, 200])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_hides_its_key_once_at_its_depth(length: int, depth: float):
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt = draw_prompt(rng, length, depth)
        assert len(prompt.text) == length
        assert prompt.text.endswith(QUESTION)
        assert re.findall(r"\d+", prompt.text) == [prompt.key]
        assert len(prompt.key) == 4
        haystack = length - SHORTEST
        place = prompt.text.index(f"The pass key is {prompt.key}. ")
        # A sentence has 16 to 23 characters, so its nearest end is at most half of that away.
        assert abs(place - depth * haystack) <= 12
        before = prompt.text[:place]
        assert not before.strip() or before.endswith(". ")


def test_keys_and_haystacks_differ():
    rng = np.random.default_rng(0)
    drawn = [draw_prompt(rng, 200, 0.5) for _ in range(20)]
    assert len({prompt.key for prompt in drawn}) >= 19
    assert len({prompt.text.replace(prompt.key, "") for prompt in drawn}) == 20


@pytest.mark.parametrize("length", [SHORTEST_ROW, 150])
def test_rows_score_answers_only(length: int):
    tokens, targets = draw_rows(np.random.default_rng(0), 40, length)
    assert tokens.shape == targets.shape == (40, length)
    assert tokens.dtype == targets.dtype == np.int32
    questions = set()
    for row, wanted in zip(tokens, targets, strict=True):
        text = TOKENIZER.decode(row)
        asked = np.flatnonzero(wanted != NOT_SCORED)
        (key,) = set(re.findall(r"key is (\d{4})", text))
        assert TOKENIZER.decode(wanted[asked]) == f"{key}. " * (len(asked) // ANSWER)
        # Behind each scored place but a row's last stands what was asked for there.
        inner = asked[asked < length - 1]
        assert all(row[i + 1] == wanted[i] for i in inner)
        # The first mention is not to be known.
        assert asked[0] > text.index(key)
        question = text.rindex(QUESTION) + len(QUESTION)
        assert asked[-ANSWER] == question - 1
        questions.add(question)
    assert len(questions) == 1 if length == SHORTEST_ROW else len(questions) > 20


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4071. The", True),
        (" 4071. The", True),
        ("40-71 is", True),
        ("4071\n", True),
        ("4071", True),
        ("4072. The", False),
        ("40711. The", False),
        ("407", False),
        ("is 4071.", False),
        ("", False),
        ("4071\n5", False),
    ],
)
def test_the_digits_of_the_first_word_are_the_answer(text: str, right: bool):
    assert is_right(text, "4071") is right


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="take 60 characters, found prompts of 59"):
        draw_prompt(np.random.default_rng(0), SHORTEST - 1, 0.5)
    with pytest.raises(ConfigError, match="take 65 characters, found rows of 64"):
        draw_rows(np.random.default_rng(0), 1, SHORTEST_ROW - 1)
