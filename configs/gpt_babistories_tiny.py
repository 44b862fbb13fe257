"""The baseline of mm_babistories_tiny: a GPT of the same size on bytes; needs `--data.path`.

Source: gpt_babistories with a twelfth of the width. The path is a file with one JSON string per
line, or a folder with train and validation files of that form.
Parameters: 0.119 M
Time: 1 min on 2 CPU cores
Result: depends on the file; there is none of its own.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        vocab_size=256,
        context_len=64,
        dim=64,
        depth=2,
        mixer=AttentionConfig(num_heads=4, dropout=0.05),
        feed_forward=MLPConfig(activation="gelu_tanh", dropout=0.05),
        positions="learned",
        dropout=0.05,
    ),
    data=DataConfig(source="jsonl", tokenizer="byte", batch_size=12),
    optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=20, accumulate=2),
    run=RunOptions(steps=300, eval_every=100, eval_batches=20),
)
