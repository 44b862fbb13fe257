"""The authors' six-layer Memory Mosaic on characters.

Source: nanoMosaics `config/train_shakespeare_char.py`.
Parameters: 10.7 M
Time: minutes on a GPU; a day on 2 CPU cores
Result: no number is published; the best checkpoint by validation loss is the one to use, for the
model overfits tiny Shakespeare.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=256,
        dim=384,
        depth=6,
        mixer=ContextualMemoryConfig(num_heads=6, dropout=0.2),
        feed_forward=PersistentMemoryConfig(num_heads=6, memory_size=1344, dropout=0.2),
        dropout=0.2,
    ),
    data=DataConfig(batch_size=64),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99),
    run=RunOptions(steps=5000, eval_every=250, eval_batches=200),
)
