"""The transformer that the paper compares mm_library with; name a text by --data.path.

Source: Memory Mosaics (arXiv 2405.06394), Library's GPT with the same recipe.
Parameters: 124 M
Time: as mm_library
Result: no number is published beside curves: equal to mm_library in distribution.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=50304,
        context_len=512,
        dim=768,
        depth=12,
        mixer=AttentionConfig(num_heads=12, dropout=0.05),
        feed_forward=MLPConfig(activation="gelu_tanh", dropout=0.05),
        positions="learned",
        dropout=0.05,
    ),
    data=DataConfig(tokenizer="gpt2", batch_size=512),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=2000, accumulate=8),
    run=RunOptions(steps=80_000, eval_every=2000, eval_batches=10, precision="bfloat16"),
)
