"""The six-layer GPT on characters, the twin of mm_shakespeare_char.

Source: nanoGPT `config/train_shakespeare_char.py`.
Parameters: 10.8 M
Time: minutes on a GPU; hours on 2 CPU cores
Result: nanoGPT reports a best validation loss of 1.47 on tiny Shakespeare.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=256,
        dim=384,
        depth=6,
        mixer=AttentionConfig(num_heads=6, dropout=0.2),
        feed_forward=MLPConfig(dropout=0.2),
        positions="learned",
        dropout=0.2,
    ),
    data=DataConfig(batch_size=64),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99),
    run=RunOptions(steps=5000, eval_every=250, eval_batches=200),
)
