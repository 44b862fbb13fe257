"""mm_babistories at CPU size, on bytes: try it on a file of stories by `--data.path`.

Source: mm_babistories with a twelfth of the width. The path is a file with one JSON string per
line, or a folder with train and validation files of that form.
Parameters: 0.115 M
Time: 1 min on 2 CPU cores
Result: depends on the file; there is none of its own.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import (
    LIBRARY_LIMIT,
    ContextualMemoryConfig,
    PersistentMemoryConfig,
)
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=256,
        context_len=64,
        dim=64,
        depth=2,
        mixer=ContextualMemoryConfig(num_heads=4, scale_limit=LIBRARY_LIMIT, dropout=0.05),
        feed_forward=PersistentMemoryConfig(
            num_heads=4, memory_size=224, scale_limit=LIBRARY_LIMIT, dropout=0.05
        ),
        scale_logits=True,
        init="fan_in",
    ),
    data=DataConfig(source="jsonl", tokenizer="byte", batch_size=12),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=20, accumulate=2),
    run=RunOptions(steps=300, eval_every=100, eval_batches=20),
)
