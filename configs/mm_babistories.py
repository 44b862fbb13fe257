"""The authors' language model: a twelve-layer Memory Mosaic on BabiStories; needs `--data.path`.

Source: Memory Mosaics (arXiv 2405.06394), sec. 6: Library `StackAssoMem`, its form, start and
recipe. The path is a folder with the train and validation files of the release, one JSON string
per line. 262,144 tokens per update; `--optim.accumulate 64` divided by the devices suits 32 GB.
Parameters: 124 M
Time: at most 18 hours on 64 V100 for the authors
Result: the authors report validation loss 1.498 (regular form) and 1.501 (efficient form), and
curves of a GPT-2 of this depth that coincide with it; not run here.
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
        vocab_size=50304,  # GPT-2's 50257 and padding
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
    data=DataConfig(source="jsonl", tokenizer="gpt2", batch_size=512),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=2000, accumulate=64),
    run=RunOptions(steps=80_000, eval_every=2000, eval_batches=640, precision="bfloat16"),
)
