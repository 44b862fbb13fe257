"""Mamba-2: a state-space layer with heads that share their queries and keys, beside a gated MLP.

Reference: Dao and Gu 2024 (arXiv 2405.21060); the baseline of 2Mamba2Furious (arXiv 2602.17363).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn.cache import check_len, continued
from jaxmem.nn.decays import log_rates, step_biases
from jaxmem.nn.fields import check_at_least_one, check_choices, check_positive
from jaxmem.nn.heads import merge_heads, split_heads
from jaxmem.nn.init import Init
from jaxmem.nn.layers import Linear, RMSNorm
from jaxmem.nn.short_conv import ShortConv
from jaxmem.nn.window import History
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.linear_attention import LinearState, init_linear_state, linear_attention
from jaxmem.ops.norms import at_least_float32
from jaxmem.ops.segments import last_real
from jaxmem.shapes import Activations, RowInts, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """A Mamba-2 block; by default all channels are those of state-space heads."""

    paper: ClassVar[str] = "Mamba-2 (arXiv 2405.21060)"
    parity: ClassVar[str] = "golden: one-head form of 2Mamba2Furious and full form"

    head_dim: int = 64
    """Channels of a head."""
    ssm_dim: int | None = None
    """Channels of all heads; the rest of the width is a gated MLP. None: all. The baseline of
    2Mamba2Furious has one head, ssm_dim = head_dim."""
    state_dim: int = 128
    """Width of queries and keys (C and B of the paper), shared by the heads."""
    conv: int = 2
    """Tokens that the convolution spans; the paper's own models have 4."""
    norm_eps: float = 1e-5
    """Epsilon of the output norm."""

    def __post_init__(self) -> None:
        """Check sizes and the epsilon."""
        super().__post_init__()
        check_choices(self, "mamba2")
        check_at_least_one(self, "mamba2", "head_dim", "state_dim", "conv")
        check_positive(self, "mamba2", norm_eps=1e-5)

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the channels of the heads fit the width."""
        inner = dim if self.ssm_dim is None else self.ssm_dim
        if not 0 < inner <= dim or inner % self.head_dim:
            raise ConfigError(
                f"{path}: ssm_dim={inner} is not a multiple of head_dim={self.head_dim} up to "
                f"model.dim={dim}. Use ssm_dim={self.head_dim} for one head, None for all."
            )


class Mamba2State(NamedTuple):
    """State-space sums and the tokens that the convolution still needs."""

    sums: LinearState
    conv: History
    segment: RowInts
    """Document of the row's last token, 0 before any."""


class _Parts(NamedTuple):
    """What the first projection is split into."""

    mlp_gate: Array
    mlp_value: Array
    z: Array
    inner: Array
    """x, B and C, which the convolution mixes."""
    dt: Array


@register("mamba2", Mamba2Config)
class Mamba2(Mixer):
    """Mamba-2: state-space heads behind a short convolution, beside a gated MLP.

    S_t = e^{-a dt_t} S_{t-1} + B_t (dt_t x_t)ᵀ,  y_t = C_tᵀ S_t + D x_t, norm(y silu(z)), W_o.

    x, B and C are a short convolution of projections, through silu; B and C are one pair for all
    heads. Channels beyond `ssm_dim` are a gated MLP, silu(g) v.

    Reference: the official Mamba-2 block; 2Mamba2Furious `mamba` (ssm_dim = head_dim).
    """

    config: Mamba2Config

    def __init__(self, config: Mamba2Config, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        inner, states = self._inner, config.state_dim
        heads = inner // config.head_dim
        self.input = Linear(dim, sum(self._widths()), use_bias=False, init=init.weight, rngs=rngs)
        self.short_conv = ShortConv(inner + 2 * states, config.conv, use_bias=False, rngs=rngs)
        self.dt_bias = nnx.Param(step_biases(rngs.params(), heads))
        self.log_rate = nnx.Param(log_rates(rngs.params(), heads))
        self.skip = nnx.Param(jnp.ones((inner,)))
        self.norm = RMSNorm(inner, eps=config.norm_eps)
        self.out = Linear(dim, dim, use_bias=False, init=init.residual, rngs=rngs)

    @property
    def _inner(self) -> int:
        return self.dim if self.config.ssm_dim is None else self.config.ssm_dim

    def _widths(self) -> tuple[int, ...]:
        """Return the widths of `_Parts`."""
        inner, rest = self._inner, self.dim - self._inner
        mixed = inner + 2 * self.config.state_dim
        return rest, rest, inner, mixed, inner // self.config.head_dim

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> Mamba2State:
        """Return the state before any token; its size does not depend on `max_len`."""
        check_len(max_len, "mamba2")
        dtype = jnp.dtype(self.out.kernel.dtype if dtype is None else dtype)
        width = self.config.head_dim
        shape = (batch, self._inner // width, self.config.state_dim, width)
        return Mamba2State(
            init_linear_state(*shape, with_total=False, dtype=dtype),
            self.short_conv.init_history(batch, dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def mix(
        self,
        x: Activations,
        state: Mamba2State | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run a row of tokens."""
        before: Any = None if state is None else state.segment
        ids: Any = segment_ids if state is None else continued(segment_ids, before, x.shape[1])
        options: dict[str, Any] = {"segment_ids": ids, "initial_segment": before}
        parts = self._split(self.input(x))
        history = None if state is None else state.conv
        mixed, history = self.short_conv(parts.inner, history, **options)
        inner, states = self._inner, self.config.state_dim
        v, k, q = jnp.split(jax.nn.silu(mixed), (inner, inner + states), axis=-1)
        dt = jax.nn.softplus(at_least_float32(parts.dt) + self.dt_bias[...])
        values = split_heads(v, dt.shape[-1])
        read: Any = linear_attention(
            q[:, :, None],
            k[:, :, None],
            values * dt[..., None].astype(v.dtype),
            scale=1.0,
            log_decay=-jnp.exp(self.log_rate[...]) * dt,
            initial_state=None if state is None else state.sums,
            implementation=implementation,
            **options,
        )
        y = at_least_float32(merge_heads(read.y)) + self.skip[...] * at_least_float32(v)
        y = y * jax.nn.silu(at_least_float32(parts.z))
        y = self.norm(y).astype(x.dtype)
        mlp = jax.nn.silu(parts.mlp_gate) * parts.mlp_value
        y = self.out(jnp.concatenate([mlp, y], axis=-1))
        if state is not None:
            state = Mamba2State(read.state, history, last_real(ids, ids != 0, before))
        return MixerOutput(y, state, {})

    def _split(self, projected: Array) -> _Parts:
        parts, start = [], 0
        for width in self._widths():
            parts.append(projected[..., start : start + width])
            start += width
        return _Parts(*parts)
