"""needle_tiny's baseline: softmax attention behind the same convolution.

Source: the needle in a haystack of 2Mamba (arXiv 2602.17363), at CPU size.
Parameters: 0.02365 M
Time: 4 min on 2 CPU cores
Result: 97 % of new rows are answered without a fault; of prompts of 128 characters, as trained,
85 % (all depths); of 256, 36 %, and of 512, 7 % (one seed).
"""

from configs._two_mamba_recall import needle
from jaxmem.interop.attention_types import from_name

config = needle(from_name("softmax", num_heads=2, conv=2))
