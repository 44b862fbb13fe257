"""Mamba-2 with all channels in heads, the full baseline of 2Mamba, on characters.

Source: 2Mamba (arXiv 2602.17363), `mamba` at CPU size. The paper trained one head, beside a gated
MLP: --model.mixer.ssm-dim 16.
Parameters: 0.09416 M
Time: under 2 min on 2 CPU cores
Result: validation loss 1.873 after 400 steps on tiny Shakespeare (one seed, 20 random batches).
"""

from configs._two_mamba_text import TINY, tiny
from jaxmem.mixers.mamba2 import Mamba2Config

config = tiny(Mamba2Config(head_dim=TINY.head_dim, state_dim=32))
