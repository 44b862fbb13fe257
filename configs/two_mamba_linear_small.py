"""Linear attention with an output norm, where the 2Mamba build-up begins; the small published size.

Source: 2Mamba (arXiv 2602.17363), `linear__output_norm`, size small.
Parameters: 275.3 M
Time: not measured; needs an accelerator.
Result: published test loss 3.13 after 100,000 updates on FineWeb.
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.interop.attention_types import from_name

config = published(from_name("linear__output_norm", num_heads=SMALL.num_heads), SMALL)
