"""The letter table and every named array shape of the library.

B batch, T query time, S key time, D model width, H query heads, G key/value heads, K key width per
head, V value width per head, N chunks or cache slots, C tokens per chunk, P stored pairs of a
persistent memory, R banks of a persistent memory, F feed-forward width, L layers, W weights per
head of a weighted average (1 or V), X vocabulary.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

Activations = Float[Array, "B T D"]
ActivationsAt = Float[Array, "B D"]
Tokens = Int[Array, "B T"]
TokensAt = Int[Array, "B"]
Logits = Float[Array, "B T X"]
LogitsAt = Float[Array, "B X"]
SegmentIds = Int[Array, "B T"]
"""Document of each token; 0 is padding, ids need not be consecutive."""
RowInts = Int[Array, "B"]
Valid = Bool[Array, "B T"]

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B S H K"]
Values = Float[Array, "B S H V"]
HeadScalars = Float[Array, "H"]

Key = PRNGKeyArray
