"""Mamba-2 with all channels in heads, the full baseline of 2Mamba; the large published size.

Source: 2Mamba (arXiv 2602.17363), `mamba`, size large; heads of 192. The paper trained one head,
beside a gated MLP: --model.mixer.ssm-dim 192.
Parameters: 1912 M
Time: not measured; needs several accelerators.
Result: no loss is published.
"""

from configs._two_mamba_text import LARGE, published
from jaxmem.mixers.mamba2 import Mamba2Config

config = published(Mamba2Config(head_dim=LARGE.head_dim), LARGE)
