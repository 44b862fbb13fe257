"""Find a pass key in a haystack of sentences: 2Mamba.

Source: the needle in a haystack of 2Mamba (arXiv 2602.17363), at CPU size.
Parameters: 0.0239 M
Time: 4 min on 2 CPU cores
Result: prompts of up to 128 characters, as trained, are all answered rightly; of 256 characters
98 %, of 512 31 % (mean over the depths, one seed).
"""

from configs._two_mamba_recall import SLOW_DECAYS, needle
from jaxmem.interop.attention_types import from_name

config = needle(from_name("2mamba", num_heads=2, **SLOW_DECAYS))
