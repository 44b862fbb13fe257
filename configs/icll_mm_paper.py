"""Learn new languages in context, at the authors' size: prompts of up to 1000 tokens.

Source: Memory Mosaics (arXiv 2405.06394), in-context language learning, Library variant; 400 passes
over 5000 automata of our own generator, with a new prompt each time.
Parameters: 0.397 M
Time: hours on a GPU
Result: published as a figure only; not run here.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.tasks.in_context import InContextConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=1000,
        dim=128,
        depth=2,
        mixer=ContextualMemoryConfig(num_heads=8, scale_limit=LIBRARY_LIMIT, dropout=0.05),
        feed_forward=PersistentMemoryConfig(
            num_heads=8, memory_size=448, scale_limit=LIBRARY_LIMIT, dropout=0.05
        ),
        scale_logits=True,
        init="fan_in",
    ),
    task=InContextConfig(),
    data=DataConfig(batch_size=32),
    optim=OptimConfig(lr=5e-4, min_lr=5e-5, warmup_steps=6250),
    run=RunOptions(steps=62_500, eval_every=2500, eval_batches=16),
)
