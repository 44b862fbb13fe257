"""The paper's language model, twelve layers of Memory Mosaics; name a text by --data.path.

Source: Memory Mosaics (arXiv 2405.06394), Library, trained on BabiStories with batches of 512.
Parameters: 124 M
Time: at most 18 h on 64 V100, the authors' limit
Result: published validation loss 1.498 (variant regular) and 1.501 (eft) on BabiStories.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=50304,
        context_len=512,
        dim=768,
        depth=12,
        mixer=ContextualMemoryConfig(num_heads=12, scale_limit=LIBRARY_LIMIT, dropout=0.05),
        feed_forward=PersistentMemoryConfig(
            num_heads=12, memory_size=2688, scale_limit=LIBRARY_LIMIT, dropout=0.05
        ),
        scale_logits=True,
        init="fan_in",
    ),
    data=DataConfig(tokenizer="gpt2", batch_size=512),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=2000, accumulate=8),
    run=RunOptions(steps=80_000, eval_every=2000, eval_batches=10, precision="bfloat16"),
)
