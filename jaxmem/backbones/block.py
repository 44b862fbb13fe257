"""One residual block: norm, mixer, residual, and mostly norm, feed-forward, residual."""

from typing import Any, Literal

from flax import nnx
from jax.typing import DTypeLike

from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, build
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Norm, NormType, build_norm
from jaxmem.shapes import Activations

NormPlace = Literal["pre", "post"]
Slot = tuple[Norm, Mixer]


class Block(nnx.Module):
    """Two mixers of any kind, or one, each with a norm and a residual connection.

    pre:  x <- x + mixer(norm(x))
    post: x <- norm(x), then x <- x + mixer(x): the residual, too, comes from the normalised stream

    Reference: nanoMosaics `Block` (pre); Library `AttnOnlyBlock` (pre and post); Llama 2
      `TransformerBlock` (pre, root-mean-square norms).
    """

    def __init__(
        self,
        mixer: MixerConfig,
        feed_forward: MixerConfig | None,
        dim: int,
        *,
        norm: NormPlace = "pre",
        norm_type: NormType = "layer",
        norm_eps: float = 1e-5,
        use_bias: bool,
        init: Init,
        rngs: nnx.Rngs,
    ):
        self.norm = norm
        self.norm_1 = build_norm(norm_type, dim, eps=norm_eps, use_bias=use_bias)
        self.mixer = build(mixer, dim, init=init, rngs=rngs)
        one = feed_forward is None
        self.norm_2 = None if one else build_norm(norm_type, dim, eps=norm_eps, use_bias=use_bias)
        self.feed_forward = None if one else build(feed_forward, dim, init=init, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None, dtype: DTypeLike | None
    ) -> tuple[Any, ...]:
        """Return the states of the slots before any token."""
        slots = self._slots()
        return tuple(s.init_state(batch, max_len=max_len, dtype=dtype) for _, s in slots)

    def __call__(
        self, x: Activations, state: tuple[Any, ...] | None, **options: Any
    ) -> MixerOutput:
        """Run the slots one after another; `options` are those of `Mixer.__call__`."""
        slots = self._slots()
        before = (None,) * len(slots) if state is None else state
        after, aux = [], {}
        for (norm, mixer), history in zip(slots, before, strict=True):
            normed = norm(x)
            out = mixer(normed, history, **options)
            x = (x if self.norm == "pre" else normed) + out.y
            after.append(out.state)
            aux |= out.aux
        return MixerOutput(x, None if state is None else tuple(after), aux)

    def _slots(self) -> list[Slot]:
        first = (self.norm_1, self.mixer)
        if self.norm_2 is None or self.feed_forward is None:
            return [first]
        return [first, (self.norm_2, self.feed_forward)]
