"""The baseline of mm_babistories: the authors' twelve-layer GPT-2; needs `--data.path`.

Source: Memory Mosaics (arXiv 2405.06394), sec. 6: Library `GPT`, the same recipe. The path is a
folder with the train and validation files of the release, one JSON string per line.
Parameters: 124 M
Time: days on 8 GPUs
Result: published as a curve, equal to the Memory Mosaic's at this depth; not run here.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=50304,  # GPT-2's 50257 and padding
        context_len=512,
        dim=768,
        depth=12,
        mixer=AttentionConfig(num_heads=12, dropout=0.05),
        feed_forward=MLPConfig(activation="gelu_tanh", dropout=0.05),
        positions="learned",
        dropout=0.05,
    ),
    data=DataConfig(source="jsonl", tokenizer="gpt2", batch_size=512),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=2000, accumulate=64),
    run=RunOptions(steps=80_000, eval_every=2000, eval_batches=640, precision="bfloat16"),
)
