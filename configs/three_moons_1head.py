"""Watch a single memory fail to share three moons: accurate only once the system repeats.

Source: Memory Mosaics (arXiv 2405.06394), sec. 5, at CPU size: context 240 and batch 16 instead of
800 and 64.
Parameters: 108
Time: under 1 min on 2 CPU cores
Result: mean error between the slowest orbit and the system's period 0.186 to 0.221 on a training
system and 0.143 to 0.149 on the unseen one, beyond it 0.024 to 0.055 (three seeds; the authors'
equations 0.291 and 0.140, then 0.042 and 0.027).
"""

from jaxmem.backbones.three_moons import ThreeMoonsConfig
from jaxmem.data.config import DataConfig
from jaxmem.tasks.three_moons import ThreeMoonsTaskConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=ThreeMoonsConfig(context_len=240, num_heads=1, head_dim=6),
    task=ThreeMoonsTaskConfig(expect="system"),
    data=DataConfig(batch_size=16),
    optim=OptimConfig(
        lr=1e-2,
        min_lr=5e-6,
        schedule="linear",
        warmup_steps=0,
        beta2=0.999,
        weight_decay=0.0,
        clip_norm=0.0,
    ),
    run=RunOptions(steps=500, eval_every=100, eval_batches=4, seed=100),
)
