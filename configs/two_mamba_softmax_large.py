"""The softmax baseline of 2Mamba; the large published size.

Source: 2Mamba (arXiv 2602.17363), `softmax`, size large; heads of 192.
Parameters: 2084 M
Time: not measured; needs several accelerators.
Result: no loss is published.
"""

from configs._two_mamba_text import LARGE, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("softmax", num_heads=LARGE.num_heads), LARGE)
