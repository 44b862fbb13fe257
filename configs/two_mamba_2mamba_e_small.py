"""2Mamba-E: softmax attention with a convolution and a decay; the small published size.

Source: 2Mamba (arXiv 2602.17363), `exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2`, size
small.
Parameters: 275.8 M
Time: not measured; needs an accelerator.
Result: no loss of this size is published; 2.59 at 735 M.
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("2mamba_e", num_heads=SMALL.num_heads), SMALL)
