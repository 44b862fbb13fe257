"""Watch three memories share three moons at the paper's size; for a GPU.

Source: Memory Mosaics (arXiv 2405.06394), sec. 5: context 800, batch 64, errors over 512 windows.
Parameters: 108
Time: not measured; about 45 times the work of three_moons_3heads
Result: not measured; the claim is checked as for three_moons_3heads.
"""

from jaxmem.backbones.three_moons import ThreeMoonsConfig
from jaxmem.data.config import DataConfig
from jaxmem.tasks.three_moons import ThreeMoonsTaskConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.optim import OptimConfig

config = RunConfig(
    model=ThreeMoonsConfig(context_len=800, num_heads=3, head_dim=2),
    task=ThreeMoonsTaskConfig(starts=512, expect="orbit"),
    data=DataConfig(batch_size=64),
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
