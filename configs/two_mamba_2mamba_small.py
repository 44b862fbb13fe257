"""2Mamba: squared attention with a convolution and a decay; the small published size.

Source: 2Mamba (arXiv 2602.17363), `squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2`, size
small.
Parameters: 275.8 M
Time: not measured; needs an accelerator.
Result: published test loss 2.73 on FineWeb, of the form with `--model.mixer.value dt`.
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("2mamba", num_heads=SMALL.num_heads), SMALL)
