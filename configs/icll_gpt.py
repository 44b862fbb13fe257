"""The baseline of icll_mm: a GPT of the same size on the same prompts.

Source: Memory Mosaics, in-context language learning (RegBench), at CPU size.
Parameters: 0.108 M
Time: 2 min on 2 CPU cores
Result: legal predictions 0.545 ± 0.001, total variation distance 0.632 ± 0.002 on new automata,
1000 updates, three seeds; it has not learnt to read the prompt by then.
"""

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.automata import PromptShape
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.tasks.in_context import InContextConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=DecoderConfig(
        context_len=128,
        dim=64,
        depth=2,
        mixer=AttentionConfig(num_heads=4),
        feed_forward=MLPConfig(),
        positions="learned",
    ),
    task=InContextConfig(prompt=PromptShape(max_length=12)),
    data=DataConfig(batch_size=20),
    optim=OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=100, beta2=0.99),
    run=RunOptions(steps=1000, eval_every=200, eval_batches=25),
)
