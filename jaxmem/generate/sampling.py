"""Draw the next token from logits: temperature, top-k, top-p, min-p, greedy."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token; hashable, so that jit can treat it as static.

    The filters work one after the other on what the one before has left:
    temperature, top-k, top-p, min-p. A filter at its default does nothing.
    """

    temperature: float = 1.0
    """Divides the logits: below 1 is safer, above 1 is wilder, 0 takes the largest (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens (and ties with the k-th); 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest one; 0 keeps all."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
          ConfigError: a value is outside its range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} is not a finite number >= 0. Use 0 for greedy."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative. Use 0 to keep every token.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]. Use 1 to keep every token.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} is not in [0, 1]. Use 0 to keep every token.")


def filter_logits(logits: Float[Array, "*B X"], sampling: Sampling) -> Float[Array, "*B X"]:
    """Scale by the temperature and set the logits of excluded tokens to -inf.

    The softmax of the result is the distribution that ``sample`` draws from. The likeliest token
    always stays. Tokens that tie with the last one kept by top-k or top-p stay too, so the result
    does not depend on the order of the vocabulary.

    Args:
      logits: unnormalised log probabilities.
      sampling: temperature above 0, and the filters.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # A token stays when those before it have not yet reached p; the first one always does.
        keep = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        keep = keep.at[..., 0].set(True)
        smallest = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if sampling.min_p > 0:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= largest + jnp.log(sampling.min_p), logits, -jnp.inf)
    return logits


def sample(logits: Float[Array, "*B X"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, "*B"]:
    """Draw one token per row: ``token ~ softmax(filter_logits(logits))``.

    At temperature 0 it is the argmax (the lowest index among equals) and the key is not used.

    Args:
      logits: unnormalised log probabilities; -inf marks a token that can never come.
      key: one key for the whole batch; map over rows for streams of their own.
      sampling: what to keep; static under jit.

    Returns:
      int32 token ids.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling), axis=-1).astype(jnp.int32)
