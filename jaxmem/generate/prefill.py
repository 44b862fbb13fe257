"""The start of every way to generate: the model's contract, and prompts read into a state."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.errors import ConfigError

CHUNK = 256  # bounds the logits of a prefill to [B, 256, X] whatever the prompt's length


class _Config(Protocol):
    @property
    def context_len(self) -> int: ...


class LanguageModel(Protocol):
    """The part of `jaxmem.backbones.decoder.Decoder` that generation uses."""

    @property
    def config(self) -> _Config:
        """What says how many tokens a state may hold."""
        ...

    def init_state(self, batch: int, *, max_len: int) -> Any:
        """Return the state before any token."""

    def __call__(
        self, tokens: Array, state: Any = None, *, segment_ids: Array | None = None
    ) -> Any:
        """Run a row of tokens; returns ``.logits`` [B T X] and ``.state``."""

    def step(self, tokens: Array, state: Any, *, segment_ids: Array | None = None) -> Any:
        """Run one token per row; returns ``.logits`` [B X] and ``.state``."""


def with_context(model: Any, context_len: int) -> Any:
    """Return a decoder with the same parameters whose states hold `context_len` tokens.

    Raises:
      ConfigError: the length is not positive, or exceeds the learned positions.
    """
    config = model.config
    if context_len < 1:
        raise ConfigError(f"A context of {context_len} tokens holds nothing. Use 1 or more.")
    if config.positions == "learned" and context_len > config.context_len:
        raise ConfigError(
            f"A context of {context_len} tokens has more positions than the "
            f"{config.context_len} that the model has learned. Use so many or fewer."
        )
    reader = nnx.merge(*nnx.split(model))
    reader.config = dataclasses.replace(config, context_len=context_len)
    return reader


def restart_tokens(tokens: Sequence[int], context_len: int) -> Sequence[int]:
    """Return the tokens that a row whose state is full starts afresh from."""
    return tokens[-max(1, context_len // 2) :]


def first_window(prompt: Sequence[int], context_len: int) -> Sequence[int]:
    """Return the tokens of a prompt that the first state is made of."""
    return prompt if len(prompt) <= context_len else restart_tokens(prompt, context_len)


def pad(rows: Sequence[Sequence[int]], context_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad on the right to chunks [N B C], N and C powers of two, so that few shapes are compiled.

    C does not exceed ``context_len``, so that a chunk always fits into a state.
    """
    lengths = np.asarray([len(r) for r in rows], np.int32)
    longest = max(1, int(lengths.max()))
    padded = 1 << (longest - 1).bit_length()
    chunk = min(CHUNK, padded, 1 << (context_len.bit_length() - 1))
    tokens = np.zeros((len(rows), padded), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    return tokens.reshape(len(rows), -1, chunk).swapaxes(0, 1), lengths


def read(
    model: LanguageModel,
    tokens: Int[Array, "N B C"],
    lengths: Int[Array, "B"],
    context_len: int,
) -> tuple[Any, Float[Array, "B X"]]:
    """Read each row's first ``lengths`` tokens into a fresh state; see `pad`.

    Returns:
      The state, and the logits of the token after each row's last one (0 for empty rows).
    """
    num_chunks, batch, chunk = tokens.shape

    def read_chunk(carry: tuple[Any, Array], index: Array) -> tuple[tuple[Any, Array], None]:
        state, logits = carry
        place = index * chunk + jnp.arange(chunk)
        segment_ids = (place[None] < lengths[:, None]).astype(jnp.int32)
        out = model(tokens[index], state, segment_ids=segment_ids)
        last = lengths - 1 - index * chunk
        picked = jnp.take_along_axis(
            out.logits, jnp.clip(last, 0, chunk - 1)[:, None, None], axis=1
        )[:, 0]
        here = (last >= 0) & (last < chunk)
        return (out.state, jnp.where(here[:, None], picked, logits)), None

    state = model.init_state(batch, max_len=context_len)
    shape = jax.eval_shape(lambda: model.step(jnp.zeros(batch, jnp.int32), state).logits)
    fresh = (state, jnp.zeros(shape.shape, shape.dtype))
    return jax.lax.scan(read_chunk, fresh, jnp.arange(num_chunks))[0]
