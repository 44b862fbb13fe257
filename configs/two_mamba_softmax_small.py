"""The softmax baseline of 2Mamba; the small published size.

Source: 2Mamba (arXiv 2602.17363), `softmax`, size small.
Parameters: 275.3 M
Time: not measured; needs an accelerator.
Result: published test loss 2.73 after 100,000 updates on FineWeb (positions rounded to bfloat16).
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("softmax", num_heads=SMALL.num_heads), SMALL)
