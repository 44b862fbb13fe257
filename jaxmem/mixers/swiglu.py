"""The gated feed-forward layer, a mixer with an empty state."""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear
from jaxmem.ops.dispatch import Implementation
from jaxmem.shapes import Activations, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(MixerConfig):
    """Two projections, one of which gates the other, and one back."""

    paper: ClassVar[str] = "Shazeer 2020 (arXiv 2002.05202)"
    parity: ClassVar[str] = "the paper's formula"

    hidden_dim: int = 384
    """Hidden width; 3 times the model width in the small Memory Mosaics v2."""

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the hidden width is positive."""
        if self.hidden_dim < 1:
            raise ConfigError(
                f"{path}.hidden_dim={self.hidden_dim} is not positive. Use {3 * dim}."
            )


@register("swiglu", SwiGLUConfig)
class SwiGLU(Mixer):
    """Gated feed-forward layer, token by token: the persistent memory of Memory Mosaics v2.

    y = W_2 (silu(W_1 x) · W_3 x)

    Reference: Shazeer 2020, sec. 2; Memory Mosaics v2 (arXiv 2507.03285), sec. 3.
    """

    config: SwiGLUConfig

    def __init__(self, config: SwiGLUConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        hidden = config.hidden_dim
        self.gate = Linear(dim, hidden, use_bias=False, init=init.weight, rngs=rngs)
        self.up = Linear(dim, hidden, use_bias=False, init=init.weight, rngs=rngs)
        self.down = Linear(hidden, dim, use_bias=False, init=init.residual, rngs=rngs)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> tuple[()]:
        """Return the empty state."""
        return ()

    def mix(
        self,
        x: Activations,
        state: tuple[()] | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Apply the layer to every token."""
        return MixerOutput(self.down(jax.nn.silu(self.gate(x)) * self.up(x)), state, {})
