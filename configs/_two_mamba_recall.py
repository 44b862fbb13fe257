"""What the presets of one task share: they differ in the mixer only."""

import dataclasses

from configs._two_mamba_text import RECIPE
from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.data.recall import RecallShape
from jaxmem.mixers.base import MixerConfig
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.tasks.associative_recall import AssociativeRecallConfig
from jaxmem.tasks.needle import NeedleConfig
from jaxmem.training.config import RunConfig, RunOptions

SLOW_DECAYS = {"decay": "neg_softplus_dt", "dt_bias": True}
"""The paper's decay times a step as in Mamba-2, which starts between 0.001 and 0.1."""
OPTIM = dataclasses.replace(RECIPE, lr=4e-3, warmup_steps=50, decay_steps=0, clip_norm=1.0)
"""That of the small language models, at a higher rate."""


def multi_query_recall(mixer: MixerConfig) -> RunConfig:
    """Return 16 pairs of 64 keys and 64 values, asked for 32 times."""
    rows = RecallShape(pairs=16, questions=32, keys=64, values=64, fillers=1, layout="adjacent")
    return RunConfig(
        model=_decoder(mixer, context_len=96),
        task=AssociativeRecallConfig(rows=rows, lengths=(96, 192)),
        data=DataConfig(batch_size=32),
        optim=OPTIM,
        run=RunOptions(steps=600, eval_every=100, eval_batches=16, seed=0),
    )


def needle(mixer: MixerConfig) -> RunConfig:
    """Return a needle in a haystack that two cores learn in minutes.

    Give mixers with decays `SLOW_DECAYS`: those of the paper forget half of all in about a token
    before they are trained, and so learn nothing here for want of a gradient from afar.
    """
    return RunConfig(
        model=_decoder(mixer, context_len=128),
        task=NeedleConfig(lengths=(64, 128, 256, 512)),
        data=DataConfig(batch_size=32),
        optim=OPTIM,
        run=RunOptions(steps=3000, eval_every=500, eval_batches=8, seed=0),
    )


def _decoder(mixer: MixerConfig, *, context_len: int) -> DecoderConfig:
    return DecoderConfig(
        context_len=context_len,
        dim=32,
        depth=2,
        mixer=mixer,
        feed_forward=SwiGLUConfig(hidden_dim=64),
        norm_type="rms",
        init="uniform",
        tie_embedding=False,
    )
