"""Generate tokens: prefill the prompts, then step over the explicit state, row by row independent.

A row never sees its neighbours: it has its own length, its own random stream and its own restarts,
so it equals itself generated alone. The context window is handled by one rule. A state holds at
most ``context_len`` tokens; when a row's state is full, the row starts afresh from its last
``context_len // 2`` tokens. A prompt longer than ``context_len`` starts the same way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxmem.errors import ConfigError, NonFiniteLoss
from jaxmem.generate.prefill import LanguageModel, first_window, pad, read, restart_tokens
from jaxmem.generate.sampling import Sampling, sample

BLOCK = 32  # tokens decoded per call of the compiled loop, and between two calls of on_tokens

# Called with the new tokens of every row since the last call; returns the rows to finish, or None.
OnTokens = Callable[[list[np.ndarray]], Sequence[int] | None]


class _Loop(NamedTuple):
    """What the decode loop carries; every array has one entry per row."""

    state: Any
    logits: Float[Array, "B X"]  # of the next token of each row
    held: Int[Array, "B"]  # tokens in the row's state
    made: Int[Array, "B"]  # tokens generated so far
    done: Bool[Array, "B"]
    waiting: Bool[Array, "B"]  # the state is full: needs a restart before the next token
    tokens: Int[Array, "B N"]  # what this block generated; -1 where nothing was
    failed: Bool[Array, "B"]  # the logits held NaN


def generate(
    model: LanguageModel | tuple[nnx.GraphDef[LanguageModel], Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: PRNGKeyArray,
    rows: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    num_tokens: int | None = None,
    use_cache: bool = True,
    on_tokens: OnTokens | None = None,
) -> list[np.ndarray]:
    """Continue every prompt by up to ``max_new_tokens`` tokens.

    Token t of row r is drawn with ``fold_in(fold_in(key, rows[r]), t)``: it depends on the row's
    number and its own tokens only, not on the batch.

    Args:
      model: a decoder, or its ``nnx.split``.
      prompts: token ids, at least one each; lengths may differ. A prompt longer than the model's
        ``context_len`` counts with its last ``context_len // 2`` tokens only.
      max_new_tokens: the most tokens to add to each row.
      sampling: how to choose a token.
      key: the source of all randomness.
      rows: each prompt's row number, for its random stream; None counts from 0.
      stop_tokens: a row that draws one of them ends; the token is not part of the result.
      num_tokens: ids from here on are never drawn (a vocabulary padded for speed); None allows all.
      use_cache: False computes the whole window anew for every token: the slow reference.
      on_tokens: called after every block of at most ``BLOCK`` tokens.

    Returns:
      The new tokens of each row, int32.

    Raises:
      ConfigError: no prompt, an empty prompt, or a negative number of tokens.
      NonFiniteLoss: the model's logits hold NaN.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is negative. Use 0 or more.")
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ConfigError("Cannot generate from an empty prompt. Give each row at least one token.")
    graphdef, params = model if isinstance(model, tuple) else nnx.split(model)
    context_len = nnx.merge(graphdef, params).config.context_len
    numbers = jnp.asarray(range(len(prompts)) if rows is None else rows, jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(numbers)
    texts = [[int(t) for t in prompt] for prompt in prompts]
    windows = [first_window(text, context_len) for text in texts]
    if max_new_tokens == 0:
        return [np.zeros(0, np.int32) for _ in prompts]
    run = _cached if use_cache else _recomputed
    plan = _Plan(sampling, tuple(stop_tokens), num_tokens, context_len)
    starts = [len(t) for t in texts]
    run(_Job(graphdef, params, texts, windows, keys, max_new_tokens, plan, on_tokens))
    return [np.asarray(t[s:], np.int32) for t, s in zip(texts, starts, strict=True)]


class _Plan(NamedTuple):
    """The part of a generation that is compiled in."""

    sampling: Sampling
    stop_tokens: tuple[int, ...]
    num_tokens: int | None
    context_len: int


class _Job(NamedTuple):
    """What both ways to generate start from; they extend ``texts`` in place."""

    graphdef: nnx.GraphDef[LanguageModel]
    params: Any
    texts: list[list[int]]
    windows: list[Sequence[int]]
    keys: PRNGKeyArray
    max_new_tokens: int
    plan: _Plan
    on_tokens: OnTokens | None


def _cached(job: _Job) -> None:
    """Extend the job's texts with the incremental state."""
    graphdef, params, texts, windows, keys, max_new_tokens, plan, on_tokens = job
    loop = _empty_loop(graphdef, params, len(texts), plan.context_len)
    refill = windows
    done = np.zeros(len(texts), bool)
    while not done.all():
        if any(refill):
            tokens, lengths = pad(refill, plan.context_len)
            loop = _refill(graphdef, params, tokens, lengths, loop, context_len=plan.context_len)
        loop = _decode_block(graphdef, params, keys, max_new_tokens, loop, plan=plan)
        block, waiting, done, failed = jax.device_get(
            (loop.tokens, loop.waiting, loop.done, loop.failed)
        )
        _check(failed)
        new = [row[row >= 0] for row in block]
        for text, added in zip(texts, new, strict=True):
            text.extend(added.tolist())
        done = _report(new, done, on_tokens)
        loop = loop._replace(done=jnp.asarray(done))
        refill = [
            restart_tokens(t, plan.context_len) if w and not d else []
            for t, w, d in zip(texts, waiting, done, strict=True)
        ]


def _recomputed(job: _Job) -> None:
    """Extend the job's texts by a full forward pass over each row's window for every token."""
    graphdef, params, texts, _, keys, max_new_tokens, plan, on_tokens = job
    starts = [len(t) for t in texts]
    windows = [list(w) for w in job.windows]
    done = np.zeros(len(texts), bool)
    while not done.all():
        lengths = np.asarray([len(w) for w in windows], np.int32)
        padded = np.zeros((len(windows), plan.context_len), np.int32)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window)] = window
        made = np.asarray([len(t) - s for t, s in zip(texts, starts, strict=True)], np.int32)
        drawn, failed = jax.device_get(
            _forward_and_draw(graphdef, params, padded, lengths, keys, made, plan=plan)
        )
        _check(failed)
        new = [np.zeros(0, np.int32) for _ in texts]
        for r in np.flatnonzero(~done):
            if drawn[r] in plan.stop_tokens:
                done[r] = True
                continue
            new[r] = drawn[r : r + 1]
            full = len(windows[r]) == plan.context_len
            texts[r].append(int(drawn[r]))
            windows[r].append(int(drawn[r]))
            if full:
                windows[r] = list(restart_tokens(texts[r], plan.context_len))
            done[r] = len(texts[r]) - starts[r] == max_new_tokens
        done = _report(new, done, on_tokens)


def _check(failed: np.ndarray) -> None:
    if failed.any():
        raise NonFiniteLoss(
            f"The model's logits are NaN in rows {np.flatnonzero(failed).tolist()}. "
            "Its parameters are not finite; choose an earlier checkpoint."
        )


def _report(new: list[np.ndarray], done: np.ndarray, on_tokens: OnTokens | None) -> np.ndarray:
    """Hand the new tokens to the caller; return ``done`` with the rows it wants to finish."""
    done = np.array(done)
    finish = on_tokens(new) if on_tokens is not None else None
    if finish is not None:
        done[list(finish)] = True
    return done


@functools.partial(jax.jit, static_argnames=("graphdef", "batch", "context_len"))
def _empty_loop(
    graphdef: nnx.GraphDef[LanguageModel], params: Any, batch: int, context_len: int
) -> _Loop:
    model = nnx.merge(graphdef, params)
    state = model.init_state(batch, max_len=context_len)
    logits = jax.eval_shape(lambda: model.step(jnp.zeros(batch, jnp.int32), state).logits)
    zeros, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    return _Loop(
        state=state,
        logits=jnp.zeros(logits.shape, logits.dtype),
        held=zeros,
        made=zeros,
        done=no,
        waiting=no,
        tokens=jnp.full((batch, BLOCK), -1, jnp.int32),
        failed=no,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "context_len"), donate_argnames=("loop",))
def _refill(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Any,
    tokens: Int[Array, "N B C"],
    lengths: Int[Array, "B"],
    loop: _Loop,
    *,
    context_len: int,
) -> _Loop:
    """Start the rows with ``lengths > 0`` afresh from their tokens; leave the others untouched."""
    model = nnx.merge(graphdef, params)
    state, logits = read(model, tokens, lengths, context_len)
    chosen = lengths > 0

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(chosen.reshape(chosen.shape + (1,) * (new.ndim - 1)), new, old)

    return loop._replace(
        state=jax.tree.map(pick, state, loop.state),
        logits=pick(logits, loop.logits),
        held=pick(lengths, loop.held),
        waiting=loop.waiting & ~chosen,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"), donate_argnames=("loop",))
def _decode_block(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Any,
    keys: PRNGKeyArray,
    max_new_tokens: Int[Array, ""] | int,
    loop: _Loop,
    *,
    plan: _Plan,
) -> _Loop:
    """Decode until every row has ended or waits for a restart, at most ``BLOCK`` tokens."""
    model = nnx.merge(graphdef, params)

    def unfinished(carry: tuple[Array, _Loop]) -> Array:
        i, loop = carry
        return (i < BLOCK) & jnp.any(~loop.done & ~loop.waiting)

    def decode(carry: tuple[Array, _Loop]) -> tuple[Array, _Loop]:
        i, loop = carry
        active = ~loop.done & ~loop.waiting
        token = _draw(loop.logits, keys, loop.made, plan)
        stopped = active & _is_in(token, plan.stop_tokens)
        kept = active & ~stopped
        made = loop.made + kept
        done = loop.done | stopped | (made == max_new_tokens)
        full = loop.held == plan.context_len
        feed = kept & ~done & ~full
        # Rows that are not fed are padding to the model: nothing of their state changes.
        out = model.step(token, loop.state, segment_ids=feed.astype(jnp.int32))
        return i + 1, _Loop(
            state=out.state,
            logits=jnp.where(feed[:, None], out.logits, loop.logits),
            held=loop.held + feed,
            made=made,
            done=done,
            waiting=loop.waiting | (kept & ~done & full),
            tokens=loop.tokens.at[:, i].set(jnp.where(kept, token, -1)),
            failed=loop.failed | (active & jnp.any(jnp.isnan(loop.logits), axis=-1)),
        )

    loop = loop._replace(tokens=jnp.full_like(loop.tokens, -1))
    return jax.lax.while_loop(unfinished, decode, (jnp.zeros((), jnp.int32), loop))[1]


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def _forward_and_draw(
    graphdef: nnx.GraphDef[LanguageModel],
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: PRNGKeyArray,
    made: Int[Array, "B"],
    *,
    plan: _Plan,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    segment_ids = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    out = nnx.merge(graphdef, params)(tokens, segment_ids=segment_ids)
    logits = jnp.take_along_axis(out.logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _draw(logits, keys, made, plan), jnp.any(jnp.isnan(logits), axis=-1)


def _draw(
    logits: Float[Array, "B X"], keys: PRNGKeyArray, made: Int[Array, "B"], plan: _Plan
) -> Int[Array, "B"]:
    if plan.num_tokens is not None and plan.num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < plan.num_tokens, logits, -jnp.inf)
    return jax.vmap(lambda row, key, t: sample(row, jax.random.fold_in(key, t), plan.sampling))(
        logits, keys, made
    )


def _is_in(token: Int[Array, "B"], tokens: tuple[int, ...]) -> Bool[Array, "B"]:
    return jnp.isin(token, jnp.asarray(tokens, jnp.int32))
