"""Beam search: the likeliest continuations of a prompt, over the explicit state.

A hypothesis is a sequence of new tokens. It ends with a stop token, whose probability counts, or
with the last token that it may have. Its score is

    score = Σ_t log p(token_t | prompt, tokens before t) / length^α

where length counts the stop token and α is ``length_power``: 0 ranks by probability, 1 by the mean
log-probability of a token. The live hypotheses of a prompt are the rows of one batch and equally
long, so all of them restart at once when their states are full (see `jaxmem.generate.engine`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmem.errors import ConfigError, NonFiniteLoss
from jaxmem.generate.prefill import LanguageModel, first_window, pad, read, restart_tokens


class Hypothesis(NamedTuple):
    """One continuation."""

    tokens: np.ndarray
    """The new tokens, int32; without the stop token."""
    log_prob: float
    """Natural logarithm of the probability of the tokens, and of the stop token if it ends so."""
    score: float
    """What hypotheses are ranked by: log_prob / length^α."""
    stopped: bool
    """Whether it ends with a stop token."""


class _Ended(NamedTuple):
    """The best hypotheses that have ended with a stop token, best first."""

    tokens: Int[Array, "K N"]
    length: Int[Array, "K"]  # stop token included
    log_prob: Float[Array, "K"]
    score: Float[Array, "K"]  # -inf: none in this place


class _Search(NamedTuple):
    """What the loop carries: the live hypotheses, those that have ended, and where it stands."""

    state: Any
    logits: Float[Array, "K X"]  # of each live hypothesis's next token
    log_prob: Float[Array, "K"]  # of the live ones, best first; -inf: none in this place
    tokens: Int[Array, "K N"]
    made: Int[Array, ""]
    held: Int[Array, ""]  # tokens in each state
    waiting: Bool[Array, ""]  # the states are full: they need a restart before the next token
    over: Bool[Array, ""]
    failed: Bool[Array, ""]  # the logits held NaN
    ended: _Ended


class _Plan(NamedTuple):
    """The part of a search that is compiled in."""

    length_power: float
    stop_tokens: tuple[int, ...]
    num_tokens: int | None
    context_len: int


def beam_search(
    model: LanguageModel | tuple[nnx.GraphDef[LanguageModel], Any],
    prompt: Sequence[int] | np.ndarray,
    *,
    beams: int,
    max_new_tokens: int,
    length_power: float = 0.0,
    stop_tokens: Sequence[int] = (),
    num_tokens: int | None = None,
) -> list[Hypothesis]:
    """Search for the continuations with the highest scores.

    Every step extends each of the ``beams`` live hypotheses by every token. Of the extensions by
    an ordinary token, the ``beams`` likeliest live on; those by a stop token join the ended
    hypotheses, of which the ``beams`` best are kept. It is over when no live hypothesis can
    overtake an ended one any more, or after ``max_new_tokens``. One beam without length power and
    stop tokens is greedy decoding; as many beams as there are prefixes is exhaustive search.

    Args:
      model: a decoder, or its ``nnx.split``.
      prompt: token ids, at least one; a long one is cut as `jaxmem.generate.engine.generate` does.
      beams: hypotheses that are followed, and the most that are returned.
      max_new_tokens: the most tokens of a hypothesis, stop token included.
      length_power: α of the score, 0 or more.
      stop_tokens: a hypothesis ends with any of these; the token is not part of the result.
      num_tokens: ids from here on never come (a vocabulary padded for speed); None allows all.

    Returns:
      Hypotheses by falling score; fewer than ``beams`` where there are no more.

    Raises:
      ConfigError: an empty prompt, or a number outside its range.
      NonFiniteLoss: the model's logits hold NaN.
    """
    _check(prompt, beams, max_new_tokens, length_power)
    if max_new_tokens == 0:
        return [Hypothesis(np.zeros(0, np.int32), 0.0, 0.0, False)]
    graphdef, params = model if isinstance(model, tuple) else nnx.split(model)
    context_len = nnx.merge(graphdef, params).config.context_len
    plan = _Plan(length_power, tuple(stop_tokens), num_tokens, context_len)
    text = [int(token) for token in prompt]
    window = first_window(text, context_len)
    search = _start(graphdef, params, *pad([window], context_len), beams, max_new_tokens, plan=plan)
    while True:
        search = _advance(graphdef, params, search, plan=plan)
        if search.failed:
            raise NonFiniteLoss(
                "The model's logits are NaN. Its parameters are not finite; choose an earlier "
                "checkpoint."
            )
        if search.over:
            return _results(search, max_new_tokens, plan)
        rows = np.asarray(search.tokens)[:, : int(search.made)]
        windows = [restart_tokens([*text, *row.tolist()], context_len) for row in rows]
        search = _restart(graphdef, params, *pad(windows, context_len), search, plan=plan)


def _check(prompt: Sequence[int] | np.ndarray, beams: int, limit: int, power: float) -> None:
    if len(prompt) == 0:
        raise ConfigError("Cannot search from an empty prompt. Give at least one token.")
    if beams < 1:
        raise ConfigError(f"beams={beams} is not positive. Use 1 or more.")
    if limit < 0:
        raise ConfigError(f"max_new_tokens={limit} is negative. Use 0 or more.")
    if not 0 <= power < math.inf:
        raise ConfigError(f"length_power={power} is not a finite number >= 0. Use 0 for none.")


@functools.partial(jax.jit, static_argnames=("graphdef", "beams", "limit", "plan"))
def _start(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Any,
    tokens: Int[Array, "N 1 C"],
    lengths: Int[Array, "1"],
    beams: int,
    limit: int,
    *,
    plan: _Plan,
) -> _Search:
    """Read the prompt once; all places hold its state, but only the first one is live."""
    first = read(nnx.merge(graphdef, params), tokens, lengths, plan.context_len)
    state, logits = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), first)
    none = jnp.full((beams,), -jnp.inf)
    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    empty = jnp.zeros((beams, limit), jnp.int32)
    return _Search(
        state=state,
        logits=logits,
        log_prob=none.at[0].set(0.0),
        tokens=empty,
        made=zero,
        held=lengths[0].astype(jnp.int32),
        waiting=no,
        over=no,
        failed=no,
        ended=_Ended(empty, jnp.ones((beams,), jnp.int32), none, none),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"), donate_argnames=("search",))
def _restart(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Any,
    tokens: Int[Array, "N K C"],
    lengths: Int[Array, "K"],
    search: _Search,
    *,
    plan: _Plan,
) -> _Search:
    state, logits = read(nnx.merge(graphdef, params), tokens, lengths, plan.context_len)
    held = lengths[0].astype(jnp.int32)
    return search._replace(state=state, logits=logits, held=held, waiting=jnp.zeros((), bool))


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"), donate_argnames=("search",))
def _advance(
    graphdef: nnx.GraphDef[LanguageModel], params: Any, search: _Search, *, plan: _Plan
) -> _Search:
    """Extend the hypotheses until the search is over or waits for a restart."""
    model = nnx.merge(graphdef, params)

    def extend(search: _Search) -> _Search:
        log_prob = search.log_prob[:, None] + _log_probs(search.logits, plan.num_tokens)
        ended = _end(search, log_prob, plan)
        log_prob = log_prob.at[:, jnp.asarray(plan.stop_tokens, jnp.int32)].set(-jnp.inf)
        beams, vocabulary = log_prob.shape
        best, place = jax.lax.top_k(log_prob.ravel(), beams)
        parent, token = place // vocabulary, place % vocabulary
        limit = search.tokens.shape[1]
        # A live hypothesis only loses probability, and none is divided by more than this.
        bound = best[0] / limit**plan.length_power
        failed = jnp.any(jnp.isnan(search.logits))
        over = (search.made + 1 == limit) | (ended.score[-1] >= bound) | failed
        full = search.held == plan.context_len
        feed = ~over & ~full
        # Rows that are not fed are padding to the model: nothing of their state changes.
        out = model.step(
            token,
            jax.tree.map(lambda x: x[parent], search.state),
            segment_ids=jnp.broadcast_to(feed, token.shape).astype(jnp.int32),
        )
        return _Search(
            state=out.state,
            logits=out.logits,
            log_prob=best,
            tokens=search.tokens[parent].at[:, search.made].set(token),
            made=search.made + 1,
            held=search.held + feed,
            waiting=~over & full,
            over=over,
            failed=failed,
            ended=ended,
        )

    return jax.lax.while_loop(lambda s: ~s.over & ~s.waiting, extend, search)


def _log_probs(logits: Float[Array, "K X"], num_tokens: int | None) -> Float[Array, "K X"]:
    logits = logits.astype(jnp.float32)
    if num_tokens is not None and num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def _end(search: _Search, log_prob: Float[Array, "K X"], plan: _Plan) -> _Ended:
    """Add the extensions by a stop token to the ended hypotheses and keep the best."""
    count = len(plan.stop_tokens)
    if not count:
        return search.ended
    beams, length = log_prob.shape[0], search.made + 1
    stopped = log_prob[:, jnp.asarray(plan.stop_tokens, jnp.int32)].ravel()
    new = _Ended(
        tokens=jnp.repeat(search.tokens, count, axis=0),
        length=jnp.full((beams * count,), length, jnp.int32),
        log_prob=stopped,
        score=stopped / length**plan.length_power,
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), search.ended, new)
    _, best = jax.lax.top_k(both.score, beams)
    return jax.tree.map(lambda x: x[best], both)


def _results(search: _Search, limit: int, plan: _Plan) -> list[Hypothesis]:
    ended, live_tokens, live, made = jax.device_get(
        (search.ended, search.tokens, search.log_prob, search.made)
    )
    found = [
        Hypothesis(tokens[: length - 1], float(log_prob), float(score), True)
        for tokens, length, log_prob, score in zip(*ended, strict=True)
    ]
    if made == limit:
        found += [
            Hypothesis(tokens, float(log_prob), float(log_prob) / limit**plan.length_power, False)
            for tokens, log_prob in zip(live_tokens, live, strict=True)
        ]
    found = [hypothesis for hypothesis in found if hypothesis.score > -math.inf]
    return sorted(found, key=lambda hypothesis: -hypothesis.score)[: len(live)]
