"""The baseline of mm_small: a GPT of the same size on the same batches.

Source: nanoGPT on tiny Shakespeare at CPU size.
Parameters: 0.806 M
Time: 2 min on 2 CPU cores
Result: validation loss 1.907 ± 0.007 at step 2000 on tiny Shakespeare (three seeds, 20 random
batches, noise 0.03); the authors' code 1.893.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=64,
        dim=128,
        depth=4,
        mixer=AttentionConfig(num_heads=4),
        feed_forward=MLPConfig(),
        positions="learned",
    ),
    data=DataConfig(batch_size=12),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99),
    run=RunOptions(steps=2000, eval_every=250, eval_batches=20),
)
