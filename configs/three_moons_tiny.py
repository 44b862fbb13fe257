"""Try three moons in seconds: short windows, a few updates; too little to show the claim.

Source: three_moons_3heads with a fifth of the context and updates.
Parameters: 108
Time: under 1 min on 2 CPU cores
Result: none to compare; the plots and the table are written as for the larger ones.
"""

from jaxmem.backbones.three_moons import ThreeMoonsConfig
from jaxmem.data.config import DataConfig
from jaxmem.tasks.three_moons import ThreeMoonsTaskConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=ThreeMoonsConfig(context_len=48, num_heads=3, head_dim=2),
    task=ThreeMoonsTaskConfig(starts=8, horizon=5),
    data=DataConfig(batch_size=8),
    optim=OptimConfig(
        lr=1e-2,
        min_lr=5e-6,
        schedule="linear",
        warmup_steps=0,
        beta2=0.999,
        weight_decay=0.0,
        clip_norm=0.0,
    ),
    run=RunOptions(steps=100, eval_every=50, eval_batches=2),
)
