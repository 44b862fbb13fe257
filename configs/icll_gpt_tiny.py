"""The baseline of icll_mm_tiny: a GPT of the same size on the same prompts.

Source: icll_gpt with smaller automata and shorter prompts.
Parameters: 0.0274 M
Time: under 1 min on 2 CPU cores
Result: legal predictions 0.609 ± 0.000, total variation distance 0.635 ± 0.001 on new automata,
400 updates, three seeds; after 3000 (one seed) 0.622 and 0.548.
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
        context_len=64,
        dim=32,
        depth=2,
        mixer=AttentionConfig(num_heads=2),
        feed_forward=MLPConfig(),
        positions="learned",
    ),
    task=InContextConfig(max_nodes=4, prompt=PromptShape(max_length=6)),
    data=DataConfig(batch_size=20),
    optim=OptimConfig(lr=5e-3, min_lr=5e-4, warmup_steps=40, beta2=0.99),
    run=RunOptions(steps=400, eval_every=100, eval_batches=25),
)
