"""A short causal convolution per channel, which tells a token of its last few predecessors."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.nn.init import uniform, uniform_fan_in
from jaxmem.nn.window import History, delays
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import Activations, RowInts, SegmentIds


class ShortConv(nnx.Module):
    """y_t = b + Σ_i w_i x_{t-(W-1)+i},  i = 0 ... W-1, channel by channel.

    The last of the W taps is that of the token itself. Tokens before the document count as 0, and a
    padded token as absent. Sums are float32 or wider.

    Args:
      dim: channels.
      width: taps W, 1 or more.
      use_bias: whether there is b.
      rngs: source of the initial parameters, U(±1/sqrt(W)), the bias too.

    Raises:
      ConfigError: the width is not positive.

    Reference: Mamba (arXiv 2312.00752) `conv1d`, without its activation. Differs: the kernel is
      stored as (W, channels), for the channels are the wide axis.
    """

    def __init__(self, dim: int, width: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        if width < 1:
            raise ConfigError(f"A convolution of width {width} has no taps. Use 1 or more.")
        self.kernel = nnx.Param(uniform_fan_in()(rngs.params(), (width, dim), jnp.float32))
        start = uniform(1.0 / math.sqrt(width))
        self.bias = nnx.Param(start(rngs.params(), (dim,), jnp.float32)) if use_bias else None

    def init_history(self, batch: int, dtype: DTypeLike) -> History:
        """Return the W - 1 tokens before rows that have none."""
        width, dim = self.kernel.shape
        return jnp.zeros((batch, width - 1, dim), dtype)

    def __call__(
        self,
        x: Activations,
        history: History | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        initial_segment: RowInts | None = None,
    ) -> tuple[Activations, History]:
        """Convolve rows of tokens.

        Args:
          x: the tokens.
          history: the W - 1 tokens before them, from `init_history` or an earlier call; None: none.
          segment_ids: document of each token, 0 for padding; None: all tokens continue the history.
          initial_segment: document that the history belongs to; None: each row's first document.

        Returns:
          y in the dtype of x, unspecified but finite at padded tokens, and the history after the
          last token.
        """
        if history is None:
            history = self.init_history(x.shape[0], x.dtype)
        delayed, history = delays(x, history, segment_ids, initial_segment)
        wide = at_least_float32(x).dtype
        kernel = self.kernel[...].astype(wide)
        y = sum(
            (tap * past.astype(wide) for tap, past in zip(kernel, delayed, strict=True)),
            start=jnp.zeros((), wide),
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(wide)
        return y.astype(x.dtype), history
