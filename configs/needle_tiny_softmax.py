"""needle_tiny's baseline: softmax attention behind the same convolution.

Source: the needle in a haystack of 2Mamba (arXiv 2602.17363), at CPU size.
Parameters: 0.02365 M
Time: 4 min on 2 CPU cores
Result: of prompts of 64 and 128 characters, as trained, 96 and 81 % are answered rightly, most
faults at the beginning; of 256 36 %, of 512 16 % (mean over the depths, one seed).
"""

from configs._two_mamba_recall import needle
from jaxmem.interop.attention_types import from_name

config = needle(from_name("softmax", num_heads=2, conv=2))
