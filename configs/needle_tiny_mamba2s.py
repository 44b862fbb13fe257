"""needle_tiny's baseline of first order: Mamba-2S.

Source: the needle in a haystack of 2Mamba (arXiv 2602.17363), at CPU size.
Parameters: 0.02397 M
Time: 4 min on 2 CPU cores
Result: as 2Mamba up to 128 characters, more slowly learnt; of 256 characters 99 %, of 512 71 %
(one seed): one key to remember is no burden for a state of first order.
"""

from configs._two_mamba_recall import SLOW_DECAYS, needle
from jaxmem.interop.attention_types import from_name

config = needle(from_name("mamba2s", num_heads=2, **SLOW_DECAYS))
