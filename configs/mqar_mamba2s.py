"""mqar_2mamba's baseline of first order: Mamba-2S.

Source: multi-query associative recall (MQAR, arXiv 2312.04927), as small as shows the difference.
Parameters: 0.0298 M
Time: 1 min on 2 CPU cores
Result: 49 % of the answers are right (mean of three seeds, 29 to 62 %) after 600 updates.
"""

from configs._two_mamba_recall import multi_query_recall
from jaxmem.interop.attention_types import from_name

config = multi_query_recall(from_name("mamba2s", num_heads=2))
