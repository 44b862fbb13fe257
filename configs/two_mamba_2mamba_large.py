"""2Mamba: squared attention with a convolution and a decay; the large published size.

Source: 2Mamba (arXiv 2602.17363), `squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2`, size
large; heads of 192.
Parameters: 2086 M
Time: not measured; needs several accelerators.
Result: no loss is published.
"""

from configs._two_mamba_text import LARGE, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("2mamba", num_heads=LARGE.num_heads), LARGE)
