"""Softmax attention with gates and a norm instead of its denominator; the large published size.

Source: arXiv 2507.23632, `gated_softmax`; its recipe, in 2Mamba's size large, heads of 192.
Parameters: 2086 M
Time: not measured; needs several accelerators.
Result: no loss is published.
"""

from configs._two_mamba_text import LARGE, published
from jaxmem.interop.attention_types import from_name

config = published(
    from_name("gated_softmax", "attention", num_heads=LARGE.num_heads),
    LARGE,
    context_len=1024,
    batch_size=36,
    clip_norm=1.0,
)
