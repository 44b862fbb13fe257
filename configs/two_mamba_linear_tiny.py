"""Linear attention with an output norm, where the 2Mamba build-up begins, on characters.

Source: 2Mamba (arXiv 2602.17363), `linear__output_norm` at CPU size.
Parameters: 0.09299 M
Time: under 2 min on 2 CPU cores
Result: validation loss 2.416 after 400 steps on tiny Shakespeare (one seed, 20 random batches).
"""

from configs._two_mamba_text import TINY, tiny
from jaxmem.interop.attention_types import from_name

config = tiny(from_name("linear__output_norm", num_heads=TINY.num_heads))
