"""mqar_2mamba's baseline without convolution and decay: linear attention.

Source: multi-query associative recall (MQAR, arXiv 2312.04927), as small as shows the difference.
Parameters: 0.02896 M
Time: 1 min on 2 CPU cores
Result: 10 % of the answers are right (mean of three seeds); one in sixteen is a guess.
"""

from configs._two_mamba_recall import multi_query_recall
from jaxmem.interop.attention_types import from_name

config = multi_query_recall(from_name("linear__output_norm", num_heads=2))
