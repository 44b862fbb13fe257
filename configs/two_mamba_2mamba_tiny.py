"""2Mamba: squared attention with a convolution and a decay, on characters.

Source: 2Mamba (arXiv 2602.17363), `squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2` at CPU
size.
Parameters: 0.09453 M
Time: under 2 min on 2 CPU cores
Result: validation loss 1.857 after 400 steps on tiny Shakespeare (one seed, 20 random batches).
"""

from configs._two_mamba_text import TINY, tiny
from jaxmem.interop.attention_types import from_name

config = tiny(from_name("2mamba", num_heads=TINY.num_heads))
