"""Depth study: a Memory Mosaic of two blocks; see mm_depth_1.

Source: Memory Mosaics (arXiv 2405.06394), sec. 6, curves by depth; here on made-up stories.
Parameters: 0.0276 M
Time: 1 min on 2 CPU cores
Result: validation loss 0.662 at step 4000 (one seed).
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=64,
        dim=32,
        depth=2,
        mixer=ContextualMemoryConfig(num_heads=4),
        feed_forward=PersistentMemoryConfig(num_heads=4, memory_size=128),
    ),
    data=DataConfig(source="stories", batch_size=16),
    optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=100, beta2=0.99),
    run=RunOptions(steps=4000, eval_every=500, eval_batches=20),
)
