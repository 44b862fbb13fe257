"""What the language models of 2Mamba share: three sizes and one recipe; they differ in the mixer.

Reference: 2Mamba2Furious (arXiv 2602.17363); the gated types come from arXiv 2507.23632.
  Differs: the learning rate is that of the update's number; the papers' schedule lags one update
  behind, so that the rate of their first two is 0. Documents come in shuffled epochs, every one
  once; theirs are drawn with replacement. The documents kept for validation are chosen by a hash
  of their text, so theirs are others.
"""

import dataclasses
from typing import NamedTuple

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.backbones.llama import llama
from jaxmem.data.config import DataConfig
from jaxmem.mixers.base import MixerConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig


class Size(NamedTuple):
    """Width, heads and depth; feed-forward layers are twice as wide."""

    dim: int
    num_heads: int
    depth: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads


TINY, SMALL, LARGE = Size(64, 4, 2), Size(1024, 16, 20), Size(3072, 16, 20)

RECIPE = OptimConfig(
    lr=1e-4,
    min_lr=0.0,
    schedule="linear",
    warmup_steps=10_000,
    decay_steps=1_000_000,
    beta1=0.9,
    beta2=0.999,
    eps=1e-7,
    weight_decay=0.01,
    decay_all=True,
    clip_norm=0.0,
)
"""AdamW as in both papers. Runs of 100,000 updates end at 0.909 of the highest rate."""


def tiny(mixer: MixerConfig) -> RunConfig:
    """Return a model of characters that two cores train in about a minute."""
    return RunConfig(
        model=_decoder(mixer, TINY, context_len=128),
        data=DataConfig(batch_size=16),
        optim=dataclasses.replace(RECIPE, lr=3e-3, warmup_steps=50, decay_steps=0, clip_norm=1.0),
        run=RunOptions(steps=400, eval_every=100, eval_batches=20, seed=0),
    )


def published(
    mixer: MixerConfig,
    size: Size,
    *,
    context_len: int = 2048,
    batch_size: int = 32,
    clip_norm: float = 0.0,
) -> RunConfig:
    """Return a model of a published size with the papers' recipe.

    The text is named by --data.path, its vocabulary of 32,000 tokens (Llama 2's) by
    --data.tokenizer.

    Args:
      mixer: first slot of each block.
      size: of the model.
      context_len: tokens per row; 1024 in the paper of the gated types, in the other 2048 or more.
      batch_size: documents per update; 36 and 32.
      clip_norm: 1 for gated models; 0: no clipping.
    """
    decoder = _decoder(mixer, size, context_len=context_len)
    return RunConfig(
        model=dataclasses.replace(decoder, vocab_size=32_000, remat=True, scan_layers=True),
        data=DataConfig(
            source="jsonl",
            tokenizer="tokenizer.json",
            batch_size=batch_size,
            sampling="documents",
            begin_of_text=True,
            validation_share=0.001,
        ),
        optim=dataclasses.replace(RECIPE, clip_norm=clip_norm),
        run=RunOptions(
            steps=100_000,
            eval_every=10_000,
            eval_batches=100,
            checkpoint_every=1_000,
            precision="bfloat16",
        ),
    )


def _decoder(mixer: MixerConfig, size: Size, *, context_len: int) -> DecoderConfig:
    return llama(
        mixer,
        hidden_dim=2 * size.dim,
        context_len=context_len,
        dim=size.dim,
        depth=size.depth,
    )
