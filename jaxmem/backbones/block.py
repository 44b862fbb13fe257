"""One residual block: norm, mixer, residual, norm, feed-forward, residual."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxmem.mixers.base import MixerConfig, MixerOutput, build
from jaxmem.nn.init import Init
from jaxmem.nn.layers import LayerNorm
from jaxmem.shapes import Activations


class Block(nnx.Module):
    """x += mixer(norm(x)); x += feed_forward(norm(x)). Both slots take any mixer."""

    def __init__(
        self,
        mixer: MixerConfig,
        feed_forward: MixerConfig,
        dim: int,
        *,
        use_bias: bool,
        init: Init,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = LayerNorm(dim, use_bias=use_bias)
        self.mixer = build(mixer, dim, init=init, rngs=rngs)
        self.norm_2 = LayerNorm(dim, use_bias=use_bias)
        self.feed_forward = build(feed_forward, dim, init=init, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None, dtype: DTypeLike | None
    ) -> tuple[Any, Any]:
        """Return the states of both slots before any token."""
        slots = (self.mixer, self.feed_forward)
        first, second = (s.init_state(batch, max_len=max_len, dtype=dtype) for s in slots)
        return first, second

    def __call__(
        self, x: Activations, state: tuple[Any, Any] | None, **options: Any
    ) -> MixerOutput:
        """Run both slots; `options` are those of `Mixer.__call__` and go to both."""
        before = (None, None) if state is None else state
        mixed = self.mixer(self.norm_1(x), before[0], **options)
        x = x + mixed.y
        fed = self.feed_forward(self.norm_2(x), before[1], **options)
        after = None if state is None else (mixed.state, fed.state)
        return MixerOutput(x + fed.y, after, mixed.aux | fed.aux)
