"""A small decoder that keeps the model's contract, so that the engine is tested on its own."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class StandInConfig:
    context_len: int = 12
    vocab_size: int = 11


class State(NamedTuple):
    memory: jax.Array  # [B D]
    count: jax.Array  # [B]


class Output(NamedTuple):
    logits: jax.Array
    state: Any
    aux: dict


class StandIn(nnx.Module):
    """logits_t = W (0.8 memory_{t-1} + E[token_t] + P[t]); a recurrence with learned positions.

    Positions make a restart visible: the same tokens give other logits at another place.
    """

    def __init__(self, config, *, seed=13):  # with 13 texts are long, and stop at different places
        self.config = config
        rng, width = np.random.default_rng(seed), 16

        def normal(*shape, scale=1.0):
            return nnx.Param(jax.device_put(np.float32(scale * rng.normal(size=shape))))

        self.embed = normal(config.vocab_size, width)
        self.place = normal(config.context_len, width)
        self.head = normal(width, config.vocab_size, scale=0.2)

    def init_state(self, batch, *, max_len=None, dtype=None):
        del max_len, dtype
        return State(jnp.zeros((batch, 16)), jnp.zeros(batch, jnp.int32))

    def step(self, tokens, state, *, segment_ids=None):
        real = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        place = jnp.where(state.count < self.config.context_len, state.count, 0)
        memory = 0.8 * state.memory + self.embed[...][tokens] + self.place[...][place]
        memory = jnp.where((real > 0)[:, None], memory, state.memory)
        overrun = (state.count >= self.config.context_len) & (real > 0)
        logits = jnp.where(overrun[:, None], jnp.nan, memory @ self.head[...])
        return Output(logits, State(memory, state.count + (real > 0)), {})

    def __call__(self, tokens, state=None, *, segment_ids=None, positions=None, rngs=None):
        del positions, rngs
        fresh = state is None
        state = self.init_state(tokens.shape[0]) if fresh else state
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids

        def read(state, inputs):
            out = self.step(inputs[0], state, segment_ids=inputs[1])
            return out.state, out.logits

        state, logits = jax.lax.scan(read, state, (tokens.T, segment_ids.T))
        return Output(logits.swapaxes(0, 1), None if fresh else state, {})
