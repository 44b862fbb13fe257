"""Decoder language model: embedding, blocks of any mixers, norm, output head."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxmem.backbones.base import ModelConfig, register_model
from jaxmem.backbones.block import Block, NormPlace
from jaxmem.errors import ConfigError, ShapeError
from jaxmem.mixers.base import Form, MixerConfig, call_key
from jaxmem.nn.cache import continued
from jaxmem.nn.init import INIT_RULES, InitRule
from jaxmem.nn.layers import (
    Embedding,
    NormType,
    build_norm,
    check_dropout,
    check_norm,
    dropout,
)
from jaxmem.ops.segments import last_real, positions_in_segment, spans
from jaxmem.shapes import Activations, RowInts, SegmentIds, Tokens, TokensAt


@register_model("decoder")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder: how wide, how deep, and what stands in the two slots of its blocks."""

    vocab_size: int = 0
    """Tokens of the vocabulary; 0 takes the size from the tokenizer."""
    context_len: int = 64
    """Tokens per training window; with learned positions also the longest context."""
    dim: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    mixer: MixerConfig
    """First slot of each block: what looks at other tokens."""
    feed_forward: MixerConfig | None
    """Second slot of each block; None: blocks of one slot."""
    norm: NormPlace = "pre"
    """Norms before each slot (pre), or on the residual stream itself (post)."""
    norm_type: NormType = "layer"
    """Layer norms (GPT, Memory Mosaics), or root-mean-square norms (Llama)."""
    norm_eps: float = 1e-5
    """Added to the variance, or to the mean square, that norms divide by the root of."""
    positions: Literal["none", "learned"] = "none"
    """Learned absolute positions (GPT), or none (Memory Mosaics)."""
    tie_embedding: bool = True
    """The output head is the embedding table; otherwise it has a table of its own."""
    scale_logits: bool = False
    """Divide logits by the root of the width (Memory Mosaics' Library)."""
    init: InitRule = "gpt2"
    """Start of projections: gpt2, N(0, 0.02); fan_in, N(0, 1/sqrt(inputs)) (Library);
    depth_scaled, fan_in over sqrt(2 block), cut at 3 σ (Memory Mosaics v2); or uniform,
    U(±1/sqrt(inputs)) (2Mamba)."""
    use_bias: bool = False
    """Biases in the layer norms."""
    dropout: float = 0.0
    """Dropout of the embeddings."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time, the same result."""
    scan_layers: bool = False
    """Compile the blocks once instead of `depth` times: the same result and checkpoints. Each call
    stacks the parameters of all blocks, and the backward pass their gradients, so that twice the
    size of the blocks is added to the memory of a training step. Calls with a state (generation)
    compile every block, for they would copy all caches at each token."""

    def __post_init__(self) -> None:
        """Check sizes and that both slots can be built at this width."""
        for field in ("context_len", "dim", "depth"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field}={getattr(self, field)} is not positive.")
        if self.vocab_size < 0:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size}. Use 0 for the tokenizer's size."
            )
        if self.init not in INIT_RULES:
            raise ConfigError(f"model.init={self.init!r}. Use one of {', '.join(INIT_RULES)}.")
        check_norm(self.norm_type, self.norm_eps, "model", use_bias=self.use_bias)
        check_dropout(self.dropout, "model")
        self.mixer.check(self.dim, "model.mixer")
        if self.feed_forward is not None:
            self.feed_forward.check(self.dim, "model.feed_forward")

    def build(self, rngs: nnx.Rngs, compute_dtype: DTypeLike = jnp.float32) -> "Decoder":
        """Build the decoder."""
        return Decoder(self, rngs=rngs, compute_dtype=compute_dtype)


BlockStates = tuple[tuple[Any, ...], ...]
"""Block by block, the states of its slots."""


class DecoderState(NamedTuple):
    """States of all blocks, and each row's place in its document."""

    blocks: BlockStates
    position: RowInts
    """Tokens of the current document seen so far."""
    segment: RowInts
    """Document of the row's last token, 0 before any."""


class DecoderOutput(NamedTuple):
    """What a call of a decoder returns."""

    logits: Array
    """[B T X], or [B X] from `step`; unspecified but finite at padded tokens."""
    state: DecoderState | None
    aux: dict[str, Array]


class Decoder(nnx.Module):
    """logits = norm(blocks(embed(tokens) + position)) · head^T, head = embed if tied.

    nanoMosaics is contextual memory + persistent memory without positions, and so is the Library's
    model, with scaled logits; nanoGPT is multi-head attention + MLP with learned positions.

    Args:
      config: sizes and slots; `vocab_size` must be set by now.
      rngs: source of the initial parameters.
      compute_dtype: dtype of the activations; parameters are float32.

    Raises:
      ConfigError: `vocab_size` is still 0.

    Reference: nanoMosaics `MemoryMosaic`; Library `StackAssoMem`; nanoGPT `GPT`.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, compute_dtype: DTypeLike = jnp.float32
    ):
        if config.vocab_size == 0:
            raise ConfigError(
                "model.vocab_size is 0, which means the tokenizer's size. "
                "Replace it with a number before building a Decoder by hand."
            )
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        rule = INIT_RULES[config.init]
        init = rule(config.depth, 0)
        sizes, tied = (config.vocab_size, config.dim), config.tie_embedding
        self.embedding = Embedding(*sizes, init=init.head if tied else init.embedding, rngs=rngs)
        self.head = None if tied else Embedding(*sizes, init=init.head, rngs=rngs)
        self.position = (
            Embedding(config.context_len, config.dim, init=init.embedding, rngs=rngs)
            if config.positions == "learned"
            else None
        )
        self.blocks = nnx.List(
            Block(
                config.mixer,
                config.feed_forward,
                config.dim,
                norm=config.norm,
                norm_type=config.norm_type,
                norm_eps=config.norm_eps,
                use_bias=config.use_bias,
                init=rule(config.depth, number),
                rngs=rngs,
            )
            for number in range(config.depth)
        )
        self.norm = build_norm(
            config.norm_type, config.dim, eps=config.norm_eps, use_bias=config.use_bias
        )

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> DecoderState:
        """Return the state before any token, for `max_len` (default `context_len`) per row."""
        max_len = self.config.context_len if max_len is None else max_len
        dtype = self.compute_dtype if dtype is None else dtype
        blocks = tuple(b.init_state(batch, max_len=max_len, dtype=dtype) for b in self.blocks)
        zeros = jnp.zeros((batch,), jnp.int32)
        return DecoderState(blocks, zeros, zeros)

    def __call__(
        self,
        tokens: Tokens,
        state: DecoderState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: SegmentIds | None = None,
        rngs: nnx.Rngs | None = None,
        form: Form | None = None,
    ) -> DecoderOutput:
        """Predict the successor of every token.

        Args:
          tokens: indices into the vocabulary; T may be 0.
          state: history from `init_state` or an earlier call; None: none, and none is returned.
          segment_ids: document of each token, 0 for padding; None: all tokens continue the row's
            document.
          positions: place of each token in its document; None: counted, on from the state.
          rngs: source of dropout masks; None is evaluation.
          form: how the mixers run a sequence; None: as each is configured.

        Raises:
          ShapeError: a row is longer than the learned positions. A row whose state grows beyond
            them, or beyond `max_len`, gets NaN logits.
        """
        if tokens.shape[1] == 0:
            wide = jnp.promote_types(self.compute_dtype, jnp.float32)
            return DecoderOutput(
                jnp.zeros((*tokens.shape, self.config.vocab_size), wide), state, {}
            )
        counted, state_after = self._count(tokens, state, segment_ids)
        x = self._embed(tokens, counted if positions is None else positions)
        x = dropout(x, self.config.dropout, rngs)
        before = None if state is None else state.blocks
        # Mixers count their own positions: told of them, they could not see that rows are alike.
        ids = {"segment_ids": segment_ids, "positions": positions}
        x, states, aux = self._run(x, before, ids, rngs=rngs, form=form)
        head = self.embedding if self.head is None else self.head
        logits = head.logits(self.norm(x))
        if self.config.scale_logits:
            logits = logits / math.sqrt(self.config.dim)
        if state_after is not None:
            state_after = state_after._replace(blocks=states)
        return DecoderOutput(logits, state_after, aux)

    def step(
        self, tokens: TokensAt, state: DecoderState, *, segment_ids: TokensAt | None = None
    ) -> DecoderOutput:
        """Predict the successor of one token per row."""
        ids = None if segment_ids is None else segment_ids[:, None]
        out = self(tokens[:, None], state, segment_ids=ids, form="parallel")
        return out._replace(logits=out.logits[:, 0])

    def _run(
        self,
        x: Activations,
        states: BlockStates | None,
        ids: dict[str, SegmentIds | None],
        *,
        rngs: nnx.Rngs | None,
        form: Form | None,
    ) -> tuple[Activations, BlockStates | None, dict[str, Array]]:
        """Run all blocks; return their output, states and metrics."""
        call: Any = None if rngs is None else call_key(rngs)

        def run(graph: Any, x: Array, part: tuple[Any, Any, Any]) -> tuple[Array, tuple[Any, Any]]:
            params, state, key = part
            draws = None if key is None else nnx.Rngs(dropout=key, call=call)
            out = nnx.merge(graph, params)(x, state, rngs=draws, form=form, **ids)
            return out.y, (out.state, out.aux)

        graphs, parts = [], []
        for number, block in enumerate(self.blocks):
            graph, params = nnx.split(block)
            graphs.append(graph)
            before = None if states is None else states[number]
            parts.append((params, before, None if rngs is None else rngs.dropout()))
        if self.config.scan_layers and states is None:
            x, results = _in_a_loop(partial(run, graphs[0]), x, parts, remat=self.config.remat)
        else:
            runs = [partial(run, graph) for graph in graphs]
            x, results = _one_by_one(runs, x, parts, remat=self.config.remat)
        aux = {
            f"{name}/block_{number}": value
            for number, (_, values) in enumerate(results)
            for name, value in values.items()
        }
        return x, None if states is None else tuple(after for after, _ in results), aux

    def _count(
        self, tokens: Tokens, state: DecoderState | None, segment_ids: SegmentIds | None
    ) -> tuple[SegmentIds, DecoderState | None]:
        """Return the place of each token in its document, and the state with its counters moved."""
        if state is None:
            if segment_ids is None:
                return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None
            return positions_in_segment(spans(segment_ids)), None
        ids = continued(segment_ids, state.segment, tokens.shape[1])
        rows = spans(ids, state.segment)
        places = positions_in_segment(rows, state.position)
        return places, state._replace(
            position=last_real(places + 1, rows.valid, state.position),
            segment=last_real(ids, rows.valid, state.segment),
        )

    def _embed(self, tokens: Tokens, positions: SegmentIds) -> Array:
        x = self.embedding(tokens, dtype=self.compute_dtype)
        if self.position is None:
            return x
        longest = self.config.context_len
        if tokens.shape[1] > longest:
            raise ShapeError(
                f"A row of {tokens.shape[1]} tokens is longer than the {longest} learned positions "
                f"(model.context_len). Cut the row, or train with a larger context_len."
            )
        return x + self.position(positions, dtype=self.compute_dtype)


BlockRun = Callable[[Array, Any], tuple[Array, Any]]
"""From a block's input and its part of the model to its output and what else it returns."""


def _one_by_one(
    runs: list[BlockRun], x: Array, parts: list[Any], *, remat: bool
) -> tuple[Array, list[Any]]:
    """Run blocks on each other's output; `remat` forgets what they keep for the backward pass."""
    results = []
    for run, part in zip(runs, parts, strict=True):
        x, result = (jax.checkpoint(run) if remat else run)(x, part)
        results.append(result)
    return x, results


def _in_a_loop(
    run: BlockRun, x: Array, parts: list[Any], *, remat: bool
) -> tuple[Array, list[Any]]:
    """Do the same for blocks that are alike in all but their parts, compiled once."""
    # A loop alone keeps the compiler from merging a block's two runs.
    body = jax.checkpoint(run, prevent_cse=False) if remat else run
    x, stacked = lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
    return x, [jax.tree.map(itemgetter(number), stacked) for number in range(len(parts))]
