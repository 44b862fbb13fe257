"""Softmax attention with gates and a norm instead of its denominator; the small published size.

Source: arXiv 2507.23632, `gated_softmax`; its recipe, in 2Mamba's size small.
Parameters: 276 M
Time: not measured; needs an accelerator.
Result: no loss is published as a number.
"""

from configs._two_mamba_text import SMALL, published
from jaxmem.interop.attention_types import from_name

config = published(
    from_name("gated_softmax", "attention", num_heads=SMALL.num_heads),
    SMALL,
    context_len=1024,
    batch_size=36,
    clip_norm=1.0,
)
