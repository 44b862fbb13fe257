"""Mamba-2 with all channels in heads, the full baseline of 2Mamba; the small published size.

Source: 2Mamba (arXiv 2602.17363), `mamba`, size small. The paper trained one head, beside a gated
MLP: --model.mixer.ssm-dim 64.
Parameters: 260 M
Time: not measured; needs an accelerator.
Result: none for this form; the one-head model's published test loss on FineWeb is 2.88.
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.mixers.mamba2 import Mamba2Config

config = published(Mamba2Config(head_dim=SMALL.head_dim), SMALL)
