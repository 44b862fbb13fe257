"""Needle in a haystack: a pass key hidden among short sentences, and a question about it.

    The sky is blue. The pass key is 4071. The road is long. What is the pass key? The pass key is

Every character is a token. A prompt has exactly the length asked for; its first sentence may be
cut. The key stands between two sentences, at that place which is nearest to its depth: 0 is the
start of the haystack, 1 its end.

Reference: the retrieval test of 2Mamba2Furious (arXiv 2602.17363) on nanotron's
  `simple_needle_in_a_hay_stack`, whose prompts are longer and made of word pieces.
"""

import itertools
from typing import NamedTuple

import numpy as np

from jaxmem.data.scored import NOT_SCORED, ScoredRows
from jaxmem.data.tokenizers import CharTokenizer
from jaxmem.errors import ConfigError

DIGITS = 4
"""Of a pass key."""
NEEDLE = "The pass key is {key}. "
QUESTION = "What is the pass key? The pass key is "
END = ". "
"""What ends a pass key; it is learnt too, for a key that goes on is a wrong one."""
SUBJECTS = (
    "bread", "cloud", "field", "forest", "garden", "grass", "house", "moon", "river", "road",
    "sea", "sky", "snow", "stone", "sun", "tower", "town", "wind",
)  # fmt: skip
QUALITIES = (
    "blue", "bright", "cold", "dark", "dry", "far", "green", "grey", "high", "long", "new", "old",
    "quiet", "red", "small", "warm", "white", "wide",
)  # fmt: skip

TOKENIZER = CharTokenizer.from_text(
    "".join((*SUBJECTS, *QUALITIES, NEEDLE.format(key="0123456789"), QUESTION))
)
"""The characters of all prompts."""
SHORTEST = len(NEEDLE.format(key="0" * DIGITS)) + len(QUESTION)
"""Characters of a prompt without haystack."""
ANSWER = DIGITS + len(END)
"""Characters that are scored."""
SHORTEST_ROW = SHORTEST + ANSWER - 1
"""Characters of the shortest row: a prompt, and the answer less its last, only a target."""


class Prompt(NamedTuple):
    """A question and what it asks for."""

    text: str
    key: str


def draw_prompt(rng: np.random.Generator, length: int, depth: float) -> Prompt:
    """Draw a prompt of `length` characters with its key at a depth of the haystack, 0 to 1.

    Raises:
      ConfigError: needle and question do not fit.
    """
    if length < SHORTEST:
        raise ConfigError(
            f"Needle and question take {SHORTEST} characters, found prompts of {length}. "
            f"Use {SHORTEST} or more."
        )
    key = _key(rng)
    haystack, places = _haystack(rng, length - SHORTEST)
    place = int(places[np.argmin(np.abs(places - depth * len(haystack)))])
    needle = NEEDLE.format(key=key)
    return Prompt(f"{haystack[:place]}{needle}{haystack[place:]}{QUESTION}", key)


def draw_rows(rng: np.random.Generator, rows: int, length: int) -> ScoredRows:
    """Draw rows of `length` characters to train on.

    A row is a prompt of any length that fits, with its answer, and says its key several times: each
    sentence behind the first mention is another one with a probability that is drawn for the row,
    and of these, words are missing at the start. All mentions but the first are scored, so that
    keys are asked for from near and from afar.

    Raises:
      ConfigError: none fits.
    """
    if length < SHORTEST_ROW:
        raise ConfigError(
            f"Needle, question and answer take {SHORTEST_ROW} characters, found rows of {length}. "
            "Use a longer `model.context_len`."
        )
    blank = TOKENIZER.encode(" ")[0]
    tokens = np.full((rows, length), blank, np.int32)
    targets = np.full((rows, length), NOT_SCORED, np.int32)
    for row, scored in zip(tokens, targets, strict=True):
        text, starts = _mentions(rng, int(rng.integers(SHORTEST, length - ANSWER + 2)))
        ids = TOKENIZER.encode(text)
        row[: len(ids) - 1] = ids[:-1]
        for start in starts:
            scored[start - 1 : start - 1 + ANSWER] = ids[start : start + ANSWER]
    return ScoredRows(tokens, targets)


def is_right(continuation: str, key: str) -> bool:
    """Score what a model has added to a prompt: are the digits of its first word the key?

    Words are what stands between spaces. Only new text may be given: upstream scores the last
    tokens of prompt and continuation, which holds pieces of the prompt if the model stops early.
    """
    word = continuation.lstrip(" ").split(" ", 1)[0]
    return "".join(c for c in word if c in "0123456789") == key


def _mentions(rng: np.random.Generator, most: int) -> tuple[str, list[int]]:
    """Draw a prompt of at most `most` characters, with its answer; return where answers start."""
    key = _key(rng)
    needle = NEEDLE.format(key=key)
    text = _haystack(rng, int(rng.integers(most - SHORTEST + 1)))[0] + needle
    share, starts = rng.random(), []
    while True:
        again = rng.random() < share
        sentence = needle[rng.integers(needle.index(key) + 1) :] if again else _sentence(rng)
        if len(text) + len(sentence) + len(QUESTION) > most:
            break
        text += sentence
        if again:
            starts.append(len(text) - ANSWER)
    text += QUESTION
    return f"{text}{key}{END}", [*starts, len(text)]


def _key(rng: np.random.Generator) -> str:
    return "".join(str(digit) for digit in rng.integers(10, size=DIGITS))


def _sentence(rng: np.random.Generator) -> str:
    subject, quality = rng.integers(len(SUBJECTS)), rng.integers(len(QUALITIES))
    return f"The {SUBJECTS[subject]} is {QUALITIES[quality]}. "


def _haystack(rng: np.random.Generator, size: int) -> tuple[str, np.ndarray]:
    """Draw `size` characters of sentences; return them, and where sentences begin or end."""
    drawn: list[str] = []
    length = 0
    while length < size:
        drawn.append(_sentence(rng))
        length += len(drawn[-1])
    cut = length - size
    ends = np.array(list(itertools.accumulate(map(len, drawn))), int) - cut
    return "".join(drawn)[cut:], np.concatenate([[0], ends])
