"""The softmax baseline of 2Mamba, on characters.

Source: 2Mamba (arXiv 2602.17363), `softmax` at CPU size.
Parameters: 0.09286 M
Time: under 2 min on 2 CPU cores
Result: validation loss 2.035 after 400 steps on tiny Shakespeare (one seed, 20 random batches).
"""

from configs._two_mamba_text import TINY, tiny
from jaxmem.interop.attention_types import from_name

config = tiny(from_name("softmax", num_heads=TINY.num_heads))
