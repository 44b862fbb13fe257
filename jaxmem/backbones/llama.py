"""The Llama 2 decoder with any mixer in the place of its attention."""

from typing import Any

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.mixers.base import MixerConfig
from jaxmem.mixers.swiglu import SwiGLUConfig


def llama(
    mixer: MixerConfig,
    *,
    hidden_dim: int,
    norm_eps: float = 1e-5,
    tie_embedding: bool = False,
    **fields: Any,
) -> DecoderConfig:
    """Return the config of a Llama 2 decoder around a mixer.

    x <- x + mixer(n(x)),  then x <- x + W_2 (silu(W_1 n(x)) · W_3 n(x)),  n: root-mean-square norm

    There are no biases but the mixer's own and no learned positions: rotary ones are the mixer's.
    Projections start from U(±1/sqrt(inputs)), tables from N(0, 0.02).

    Args:
      mixer: first slot of each block.
      hidden_dim: width of the gated feed-forward layer.
      norm_eps: added to the mean square.
      tie_embedding: whether the output head is the embedding table.
      **fields: the others of `DecoderConfig`, such as `dim`, `depth` and `scan_layers`.

    Raises:
      ConfigError: a size makes no sense.

    Reference: Touvron et al. 2023 (arXiv 2307.09288), sec. 2.2, and 2Mamba (arXiv 2602.17363).
      Differs: Llama draws projections from N(0, 0.02), too; this start is that of 2Mamba's layers.
    """
    return DecoderConfig(
        mixer=mixer,
        feed_forward=SwiGLUConfig(hidden_dim=hidden_dim),
        norm_type="rms",
        norm_eps=norm_eps,
        init="uniform",
        tie_embedding=tie_embedding,
        **fields,
    )
