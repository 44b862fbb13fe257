"""The authors' small Memory Mosaics v2, of 24 layers; name a text by --data.path.

Source: Memory Mosaics v2 (arXiv 2507.03285): 24 layers of width 2048 on 200 billion tokens, 1024
rows of 4096 per update; its sizes add up with a vocabulary of 128,256 and an output table.
Parameters: 2039 M
Time: weeks on 8 GPUs
Result: 44.3 % on RULER's questions about many documents at 4k, 36.9 % at 32k (after fine-tuning
there), against 37.0 % and 22.1 % of a transformer; not repeated here.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.mosaic_v2 import ContextualMemoryV2Config
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=128_256,
        context_len=4096,
        dim=2048,
        depth=24,
        mixer=ContextualMemoryV2Config(num_heads=16, window=256, min_lag=64, max_lag=256),
        feed_forward=SwiGLUConfig(hidden_dim=6144),
        tie_embedding=False,
        init="depth_scaled",
        remat=True,
    ),
    data=DataConfig(tokenizer="gpt2", batch_size=1024, sampling="packed"),
    optim=OptimConfig(lr=3e-4, min_lr=3e-6, warmup_steps=2000, accumulate=128),
    run=RunOptions(steps=47_684, eval_every=1000, eval_batches=20, precision="bfloat16"),
)
