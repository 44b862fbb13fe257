"""Generate text: encode prompts, stop at strings, hand the text out as it comes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from jaxmem.data.tokenizers import Tokenizer
from jaxmem.errors import ConfigError, DataError
from jaxmem.generate.beam import beam_search
from jaxmem.generate.engine import generate
from jaxmem.generate.prefill import LanguageModel
from jaxmem.generate.sampling import Sampling

INCOMPLETE = "\ufffd"  # what decoding shows for the first bytes of a longer character

# Called with (row, new text); the pieces of a row joined are its result.
OnText = Callable[[int, str], None]


def first_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Return what an empty prompt starts from: end-of-text if there is such a token, or a newline.

    Raises:
      DataError: the vocabulary has neither.
    """
    if tokenizer.end_of_text is not None:
        return np.asarray([tokenizer.end_of_text], np.int32)
    try:
        return tokenizer.encode("\n")
    except DataError as error:
        raise DataError(
            "An empty prompt starts from an end-of-text token or a newline, and this run's "
            f"{tokenizer.kind} vocabulary has neither. Give a prompt."
        ) from error


def prompt_tokens(tokenizer: Tokenizer, prompt: str, begin_of_text: bool = False) -> np.ndarray:
    """Return what a model reads before it writes, int32 [N], N >= 1.

    Args:
      tokenizer: of the model.
      prompt: any text; an empty one without a beginning-of-text token starts from `first_tokens`.
      begin_of_text: whether the model was trained on texts that begin with that token.

    Raises:
      DataError: the prompt holds characters that the vocabulary lacks.
    """
    if begin_of_text:
        return np.asarray([tokenizer.begin_of_text, *tokenizer.encode(prompt)], np.int32)
    return tokenizer.encode(prompt) if prompt else first_tokens(tokenizer)


class _Row:
    """The text of one row as it grows; holds back what a later token could still change."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, [s for s in stop if s]
        self.tokens: list[int] = []
        self.text = ""
        self.finished = False
        self._shown = 0

    def add(self, tokens: np.ndarray) -> str:
        """Take new tokens; return the text that has become certain."""
        if self.finished or not len(tokens):
            return ""
        self.tokens.extend(tokens.tolist())
        self.text = self.decode(self.tokens)
        places = [place for s in self.stop if (place := self.text.find(s)) >= 0]
        if places:
            self.text, self.finished = self.text[: min(places)], True
            return self._show(len(self.text))
        certain = len(self.text.rstrip(INCOMPLETE))
        longest = max((_overlap(self.text[:certain], s) for s in self.stop), default=0)
        return self._show(certain - longest)

    def close(self) -> str:
        """Return what was held back: nothing can follow."""
        self.finished = True
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def generate_text(
    model: LanguageModel | tuple[nnx.GraphDef[LanguageModel], Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: PRNGKeyArray,
    begin_of_text: bool = False,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
) -> list[str]:
    """Continue every prompt; see ``engine.generate`` for lengths, streams and restarts.

    An empty prompt starts from the beginning-of-text token if the model was trained so, else from
    the end-of-text token if the vocabulary has one, else from a newline. A row ends before the
    earliest stop string in its text, at an end-of-text token, or after ``max_new_tokens``.

    Args:
      model: a decoder, or its ``nnx.split``.
      tokenizer: turns prompts to tokens and tokens to text.
      prompts: texts of any length.
      max_new_tokens: the most tokens to add to each row.
      sampling: how to choose a token.
      key: the source of all randomness.
      begin_of_text: whether the model's texts began with the beginning-of-text token.
      stop: strings that end a row; they are not part of the result.
      on_text: called with the row and its new text whenever some has become certain.

    Returns:
      The continuations, without their prompts.

    Raises:
      DataError: a prompt holds characters that the vocabulary lacks.
    """
    encoded = [prompt_tokens(tokenizer, prompt, begin_of_text) for prompt in prompts]
    rows = [_Row(tokenizer.decode, stop) for _ in prompts]

    def show(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    def take(new: list[np.ndarray]) -> list[int]:
        for r, tokens in enumerate(new):
            show(r, rows[r].add(tokens))
        return [r for r, row in enumerate(rows) if row.finished]

    end = tokenizer.end_of_text
    generate(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=() if end is None else (end,),
        num_tokens=tokenizer.vocab_size,
        on_tokens=take,
    )
    for r, row in enumerate(rows):
        show(r, row.close())
    return [row.text for row in rows]


def search_text(
    model: LanguageModel | tuple[nnx.GraphDef[LanguageModel], Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    beams: int,
    max_new_tokens: int,
    length_power: float = 0.0,
    begin_of_text: bool = False,
    stop: Sequence[str] = (),
) -> list[str]:
    """Find the continuations with the highest scores; see `jaxmem.generate.beam.beam_search`.

    Args:
      model: a decoder, or its ``nnx.split``.
      tokenizer: turns prompts to tokens and tokens to text.
      prompt: text of any length; an empty one starts as in `generate_text`.
      beams: hypotheses that are followed, and the most that are returned.
      max_new_tokens: the most tokens of a continuation.
      length_power: 0 ranks by probability, 1 by the mean log-probability of a token.
      begin_of_text: whether the model's texts began with the beginning-of-text token.
      stop: strings of one token each that end a continuation, besides the end-of-text token.

    Returns:
      The continuations, best first, without prompt and stop string.

    Raises:
      ConfigError: a stop string takes several tokens, or a number is outside its range.
      DataError: the prompt holds characters that the vocabulary lacks.
    """
    stop_tokens = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for text in filter(None, stop):
        tokens = tokenizer.encode(text).tolist()
        if len(tokens) != 1:
            raise ConfigError(
                f"The stop string {text!r} takes {len(tokens)} tokens; a search with beams ends "
                "at strings of one token only. Give another one, or draw without beams."
            )
        stop_tokens += tokens
    found = beam_search(
        model,
        prompt_tokens(tokenizer, prompt, begin_of_text),
        beams=beams,
        max_new_tokens=max_new_tokens,
        length_power=length_power,
        stop_tokens=stop_tokens,
        num_tokens=tokenizer.vocab_size,
    )
    return [tokenizer.decode(hypothesis.tokens) for hypothesis in found]
