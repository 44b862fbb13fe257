"""Linear attention with an output norm, where the 2Mamba build-up begins; the large published size.

Source: 2Mamba (arXiv 2602.17363), `linear__output_norm`, size large; heads of 192.
Parameters: 2084 M
Time: not measured; needs several accelerators.
Result: no loss is published.
"""

from configs._two_mamba_text import LARGE, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("linear__output_norm", num_heads=LARGE.num_heads), LARGE)
