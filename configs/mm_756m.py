"""The Library's Memory Mosaic of 756 M parameters; name a text by --data.path.

Source: Memory Mosaics (arXiv 2405.06394), Library's speed table; recipe: mm_babistories.
Parameters: 757 M
Time: 439 ms and 16.2 GB per step of one row on a Quadro GV100 as published (variant eft).
Result: no loss is published.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=50304,
        context_len=1024,
        dim=1536,
        depth=24,
        mixer=ContextualMemoryConfig(num_heads=16, scale_limit=LIBRARY_LIMIT, dropout=0.05),
        feed_forward=PersistentMemoryConfig(
            num_heads=16, memory_size=5376, scale_limit=LIBRARY_LIMIT, dropout=0.05
        ),
        scale_logits=True,
        init="fan_in",
        remat=True,
    ),
    data=DataConfig(tokenizer="gpt2", batch_size=512),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=2000, accumulate=32),
    run=RunOptions(steps=80_000, eval_every=2000, eval_batches=10, precision="bfloat16"),
)
