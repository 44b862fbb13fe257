"""The authors' twelve-layer Memory Mosaic, of GPT-2 small's size; name a text by --data.path.

Source: nanoMosaics `config/train_gpt2.py`: 491,520 tokens per update; vocabulary padded to 50304.
Parameters: 124 M
Time: days on 8 GPUs
Result: no number is published; a GPT-2 of this size reaches about 2.85 on OpenWebText.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=50304,
        context_len=1024,
        dim=768,
        depth=12,
        mixer=ContextualMemoryConfig(num_heads=12),
        feed_forward=PersistentMemoryConfig(num_heads=12, memory_size=2688),
    ),
    data=DataConfig(tokenizer="gpt2", batch_size=480),
    optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=2000, accumulate=40),
    run=RunOptions(steps=600_000, eval_every=1000, eval_batches=200, precision="bfloat16"),
)
