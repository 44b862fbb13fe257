"""needle_tiny's baseline of first order: Mamba-2S.

Source: the needle in a haystack of 2Mamba (arXiv 2602.17363), at CPU size.
Parameters: 0.02397 M
Time: 4 min on 2 CPU cores
Result: still at chance after 1500 updates (one seed): no answer of the new rows is right.
"""

from configs._two_mamba_recall import SLOW_DECAYS, needle
from jaxmem.interop.attention_types import from_name

config = needle(from_name("mamba2s", num_heads=2, **SLOW_DECAYS))
