"""Softmax attention, linear attention and what lies between: one layer, described by a grammar.

o_t = post_t Norm(pre_t (Σ_j κ(min(s_tj, clamp)) α_tj g_j v_j / Δ_t + D v_t)),  y_t = W_o o_t
s_tj = f(q_t)·f(k_j) / sqrt(K)

κ is exp, a power or a polynomial; α a decay; Δ a denominator; g, pre and post are gates. Every
attention type and every step of the Mamba build-up of both papers is a row of these fields, which
`jaxmem.interop.attention_types` knows by name. Powers without a clamp keep a state of fixed size,
everything else a cache.

Reference: Mongaras and Larson 2025, "On the Expressiveness of Softmax Attention: A Recurrent Neural
  Network Perspective" (arXiv 2507.23632), and 2026, "2Mamba2Furious" (arXiv 2602.17363).
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxmem.errors import ConfigError
from jaxmem.mixers.base import Mixer, MixerConfig, MixerOutput, register
from jaxmem.nn import cache
from jaxmem.nn.cache import KeyValueCache
from jaxmem.nn.decays import GROWING, Decay, DecayKind, ValueForm, discretised, step_biases
from jaxmem.nn.feature_maps import POSITIVE, Feature, featured
from jaxmem.nn.fields import check_at_least_one, check_choices, check_positive
from jaxmem.nn.head_norm import PER_HEAD, OutNorm, build_out_norm, head_normed
from jaxmem.nn.heads import check_even_heads, check_heads, merge_heads, split_qkv
from jaxmem.nn.init import Init, uniform
from jaxmem.nn.layers import Linear
from jaxmem.nn.rows import Last, Row, after, documents, init_last, places_in_row, row_of, turned
from jaxmem.nn.scaled import Scaled, changed_sum, divided, scaled, times_exp, value
from jaxmem.nn.series import Polynomial, coefficients, first_coefficients
from jaxmem.nn.short_conv import ShortConv
from jaxmem.nn.window import History, delays
from jaxmem.ops.attention import Places, attention, attention_with_lse
from jaxmem.ops.decay import bounded_decay
from jaxmem.ops.dispatch import KERNELS, Implementation
from jaxmem.ops.gated_scan import gated_scan
from jaxmem.ops.linear_attention import LinearState, init_linear_state, linear_attention
from jaxmem.ops.norms import EPS_FLOAT32, at_least_float32
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.ops.rope import PositionDType
from jaxmem.ops.segments import poison_rows
from jaxmem.ops.squared_attention import feature_count, squared_attention
from jaxmem.shapes import Activations, Queries, SegmentIds

NAME = "two_mamba"
GATE_LIMIT = 60.0
"""Largest exponent of a gate: e^60 outweighs whatever stands beside it, and sums of more than 10^11
such gates, times values, are still in the range of float32."""

Rope = Literal["none", "half", "pairs"]
Kernel = Literal["exp", Polynomial]
Denominator = Literal["one", "count", "count_pow", "sum", "gate_sum"]
KeyGate = Literal["none", "sigmoid", "count_pow"]
OutGate = Literal["none", "pre", "post", "both", "z", "pre_exp"]

_RECURRENT: tuple[Kernel, ...] = ("pow1", "pow2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoMambaConfig(MixerConfig):
    """A row of the grammar; by default 2Mamba."""

    paper: ClassVar[str] = "2Mamba2Furious (arXiv 2602.17363), softmax as RNN (arXiv 2507.23632)"
    parity: ClassVar[str] = "golden: all names of both papers, outputs and gradients"

    num_heads: int = 4
    """Heads; must divide the model width."""
    feature: Feature = "id"
    """Map f of queries and keys: elu1 is elu + 1, l2 unit length over the head, l2_heads over the
    heads at each channel (upstream's `linear_cosine`)."""
    rope: Rope = "none"
    """Rotary positions: half turns channels i and K/2 + i, before f; pairs 2i and 2i + 1, after."""
    rope_theta: float = 10000.0
    """Base of the rotary rates."""
    rope_positions: PositionDType = "float32"
    """bfloat16 repeats the rounded positions of the paper's softmax baseline; else use float32."""
    scale_products: bool = True
    """Divide products of queries and keys by the root of the head's width."""
    clamp: float | None = None
    """Largest scaled product; the gradient is 0 above it."""
    kernel: Kernel = "pow2"
    """κ: exp, a power, Taylor's sum of exp, a series with learnt coefficients θ_n / n!, or one with
    2 σ(c_n) / n! per head."""
    terms: int = 10
    """Terms of `taylor` and of the series. An even number makes a polynomial of odd degree, whose
    weights are negative far below 0, so that their sum may vanish."""
    decay: Literal["none", DecayKind] = "neg_softplus"
    """Decay of the weights per step, of each token and head (`jaxmem.nn.decays`). neg_softplus2,
    neg_silu and lagged may be growth, which is without bound unless kernel='exp' or a power is
    divided by the plain sum of its weights."""
    denominator: Denominator = "sum"
    """Δ: 1; the visible keys n; n^σ(c); the sum of the weights; or max(Σ_j e^(W x_j + b), 1),
    each gate at most e^60."""
    floor: float = 0.0
    """Least sum of the weights."""
    eps: float = 0.0
    """Added to the sum of the weights."""
    detach: bool = False
    """No gradient through the sum of the weights."""
    conv: int = 2
    """Tokens that the causal convolution of queries, keys and values spans; 0: none."""
    value: ValueForm = "none"
    """Discretised values: v dt, v σ(dt), or silu(v), softplus(v), v softplus(v)."""
    dt_bias: bool = False
    """A learnt bias of dt."""
    key_gate: KeyGate = "none"
    """Factor of each key's value: σ(W x + b) per head, or n^-σ(c)."""
    skip: bool = False
    """Add D v, before the gates and norms."""
    out_gate: OutGate = "none"
    """σ(W x + b) per head before the norm (pre), after it (post) or both; z: silu(W x + b) per
    channel, before rms_all; pre_exp: e^-(W x + b), at most e^60, before the norm."""
    norm: OutNorm = "none"
    """Norm of each head's output (l2d: unit length times K), or rms_all of all heads' together."""
    norm_eps: float = EPS_FLOAT32
    """Epsilon of ln, rms and rms_all."""

    @property
    def has_state(self) -> bool:
        """Whether decoding needs a state of fixed size only, rather than a cache."""
        return self.kernel in _RECURRENT and self.clamp is None

    @property
    def uses_dt(self) -> bool:
        """Whether the layer computes a step dt."""
        return self.value in ("dt", "sigmoid") or self.decay in ("discretize", "neg_softplus_dt")

    @property
    def sums_weights(self) -> bool:
        """Whether values are divided by the sum of the weights alone, as in softmax."""
        return self.denominator == "sum" and not (self.floor or self.eps or self.detach)

    def __post_init__(self) -> None:
        """Check the fields and that they fit together."""
        super().__post_init__()
        check_choices(self, NAME)
        _check_numbers(self)
        _check_combination(self)

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError unless the heads fit the width, and rope the heads."""
        (check_heads if self.rope == "none" else check_even_heads)(dim, self.num_heads, path)


def _check_numbers(config: TwoMambaConfig) -> None:
    check_positive(config, NAME, norm_eps=1e-5, rope_theta=10000.0)
    check_at_least_one(config, NAME, "terms")
    if config.conv not in (0, 2, 3, 4):
        raise ConfigError(f"{NAME}.conv={config.conv}. Use 2 to 4 tokens, or 0 for none.")
    if config.clamp is not None and not math.isfinite(config.clamp):
        raise ConfigError(f"{NAME}.clamp={config.clamp} is not finite. Use 5, say, or None.")
    for field in ("floor", "eps"):
        found = getattr(config, field)
        if not 0.0 <= found < math.inf:
            raise ConfigError(f"{NAME}.{field}={found} is negative or not finite. Use 0 for none.")


def _check_combination(config: TwoMambaConfig) -> None:
    sums = config.denominator == "sum"
    linear_sums = sums and config.kernel == "pow1"
    modified = bool(config.floor or config.eps or config.detach)
    wrong = {
        "denominator='sum' with kernel='pow1' divides by a sum of signed weights. "
        "Use feature='relu' or 'elu1', or a norm": linear_sums and config.feature not in POSITIVE,
        "rope='pairs' turns relu and elu1 features, and denominator='sum' with kernel='pow1' then "
        "divides by a sum of signed weights. Use rope='half', which turns before, or 'none'": (
            linear_sums and config.rope == "pairs"
        ),
        f"clamp={config.clamp} with kernel='pow1' and denominator='sum' makes weights negative. "
        "Use 0 or more, or None": linear_sums and config.clamp is not None and config.clamp < 0.0,
        "floor, eps and detach change a sum of weights. Use denominator='sum', or leave them": (
            modified and not sums
        ),
        "out_gate='post' and 'both' come after a norm of each head. Use one of norm="
        + ", ".join(PER_HEAD): config.out_gate in ("post", "both") and config.norm not in PER_HEAD,
        "dt_bias is a bias of dt, which nothing uses. Use value='dt', or dt_bias=False": (
            config.dt_bias and not config.uses_dt
        ),
        "denominator and key_gate='count_pow' share one exponent. Use it in one place": (
            config.denominator == config.key_gate == "count_pow"
        ),
        "denominator='gate_sum' is made of the output gate. Use out_gate='none'": (
            config.denominator == "gate_sum" and config.out_gate not in ("none", "z")
        ),
    }
    for message, holds in wrong.items():
        if holds:
            raise ConfigError(f"{NAME}: {message}.")


class TwoMambaState(NamedTuple):
    """What the tokens to come need of those before; None where this row of the grammar does not."""

    sums: LinearState | None
    cache: KeyValueCache | None
    conv: History | None
    """The last queries, keys and values before the convolution."""
    lagged: History | None
    """The decay that counts from the next token on."""
    gate_sum: Float[Array, "B H"] | None
    """Σ e^gate so far."""
    excess: Float[Array, "B H"] | None
    """Growth so far (`bounded_decay`)."""
    last: Last


class _Heads(NamedTuple):
    """Operands of the weighted sum."""

    q: Queries
    k: Queries
    v: Queries
    log_decay: Float[Array, "B T H"] | None
    gate: Float[Array, "B T H"] | None
    """Factors of the values, which the weights' sum does not have."""


@register("two_mamba", TwoMambaConfig)
class TwoMamba(Mixer):
    """Weighted sums of values, with weights, denominators, gates and norms of the grammar.

    Order: project, convolve, split, dt and decay, keep D v, discretise, half rope, f, pairs rope,
    weighted sum, divide, add D v, pre gate, norm per head, post gate, z, rms_all, project.

    Reference: 2Mamba2Furious, `LlamaAttention` of both of its layer files. Differs: 0 / 0 is 0 with
      gradient 0 where a query's weights are all 0, sums of exponentials never leave the range of
      floats before a norm takes their size out, and gates that are exponentials end at e^60.

    With a state, a sum of squared weights is a sum of products of both signs. Where a query is
    almost orthogonal to all keys, its relative error is about eps |q|² Σ_j α_tj |k_j|² over that
    sum (lengths of scaled q and k), and a sum that rounding makes negative counts as 0. Decays that
    are growth are unbounded, as upstream, but for rows whose weights are normalised (`decay`).
    """

    config: TwoMambaConfig

    def __init__(self, config: TwoMambaConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        super().__init__(config, dim, init=init, rngs=rngs)
        heads, width = config.num_heads, dim // config.num_heads
        plain = {"use_bias": False, "init": init.weight, "rngs": rngs}
        bias = uniform(1.0 / math.sqrt(dim))
        gate = {"use_bias": True, "bias_init": bias, "init": init.weight, "rngs": rngs}
        self.qkv = Linear(dim, 3 * dim, **plain)
        self.out = Linear(dim, dim, use_bias=False, init=init.residual, rngs=rngs)
        self.short_conv = ShortConv(3 * dim, config.conv, rngs=rngs) if config.conv else None
        self.dt = Linear(dim, heads, **plain) if config.uses_dt else None
        self.dt_bias = nnx.Param(step_biases(rngs.params(), heads)) if config.dt_bias else None
        self.decay = _decay(config, dim, init, rngs)
        self.key_gate = Linear(dim, heads, **gate) if config.key_gate == "sigmoid" else None
        self.out_gate = Linear(dim, heads, **gate) if _has_head_gate(config) else None
        self.z = Linear(dim, dim, **gate) if config.out_gate == "z" else None
        self.skip = nnx.Param(jnp.ones((heads, width))) if config.skip else None
        self.norm = build_out_norm(config.norm, dim, heads, config.norm_eps)
        powers = "count_pow" in (config.denominator, config.key_gate)
        self.exponent = nnx.Param(jnp.full((heads,), 0.5)) if powers else None
        learnt = first_coefficients(config.kernel, config.terms, heads)
        self.coefficients = None if learnt is None else nnx.Param(learnt)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> TwoMambaState:
        """Return the state before any token; `max_len` is needed where there is a cache."""
        config = self.config
        dtype = jnp.dtype(self.qkv.kernel.dtype if dtype is None else dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        heads, width = config.num_heads, self.dim // config.num_heads
        sums = stored = None
        if config.has_state:
            cache.check_len(max_len, NAME)
            features = width if config.kernel == "pow1" else feature_count(width)
            with_total = config.denominator == "sum"
            sums = init_linear_state(
                batch, heads, features, width, with_total=with_total, dtype=wide
            )
        else:
            size = cache.required_len(max_len, NAME)
            decays = self.decay is not None
            stored = cache.init_cache(batch, size, heads, width, dtype, log_decay=decays)
        per_head = jnp.zeros((batch, heads), wide)
        return TwoMambaState(
            sums=sums,
            cache=stored,
            conv=None if self.short_conv is None else self.short_conv.init_history(batch, dtype),
            lagged=per_head[:, None] if config.decay == "lagged" else None,
            gate_sum=per_head if config.denominator == "gate_sum" else None,
            excess=per_head if self._bounds_growth() else None,
            last=init_last(batch),
        )

    def mix(
        self,
        x: Activations,
        state: TwoMambaState | None,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run a row of tokens; a padded one reads what the last real one before it can read."""
        row = row_of(x.shape[1], segment_ids, positions, None if state is None else state.last)
        state = state if state is None else state._replace(last=after(row, state.last))
        qkv, state = self._convolved(self.qkv(x), row, state)
        q, k, v = split_qkv(qkv, self.config.num_heads)
        dt = self._step_size(x)
        log_decay, state = self._log_decay(x, dt, row, state)
        heads = _Heads(
            *self._turned(q, k, row),
            discretised(v, self.config.value, dt),
            log_decay,
            self._value_gate(x, row),
        )
        read, state = self._read(heads, x, row, state, implementation)
        y = self._output(read, x, v)
        if state is not None and state.cache is not None:
            y = poison_rows(cache.overrun(state.cache.length, state.cache.keys), y)
        return MixerOutput(y, state, {})

    def _convolved(
        self, qkv: Array, row: Row, state: TwoMambaState | None
    ) -> tuple[Array, TwoMambaState | None]:
        if self.short_conv is None:
            return qkv, state
        history = None if state is None else state.conv
        options = {"segment_ids": row.ids, "initial_segment": row.before}
        qkv, history = self.short_conv(qkv, history, **options)
        return qkv, state if state is None else state._replace(conv=history)

    def _step_size(self, x: Activations) -> Array | None:
        """Return dt [B T H] in float32 or wider."""
        if self.dt is None:
            return None
        raw = at_least_float32(self.dt(x))
        if self.dt_bias is not None:
            raw = raw + self.dt_bias[...]
        return jax.nn.sigmoid(raw) if self.config.value == "sigmoid" else jax.nn.softplus(raw)

    def _log_decay(
        self, x: Activations, dt: Array | None, row: Row, state: TwoMambaState | None
    ) -> tuple[Array | None, TwoMambaState | None]:
        if self.decay is None:
            return None, state
        log_decay = self.decay(x, dt)
        if self.config.decay == "lagged":
            start = jnp.zeros_like(log_decay[:, :1])
            before = start if state is None or state.lagged is None else state.lagged
            (log_decay, _), after = delays(log_decay, before, row.ids, row.before)
            state = state if state is None else state._replace(lagged=after)
        if row.spans is not None:
            log_decay = jnp.where(row.spans.valid[..., None], log_decay, 0.0)
        return log_decay, state

    def _turned(self, q: Queries, k: Queries, row: Row) -> tuple[Queries, Queries]:
        """Return queries and keys after rope and feature map."""
        config = self.config
        options: dict[str, Any] = {"theta": config.rope_theta}
        options["position_dtype"] = config.rope_positions
        if config.rope == "half":
            q, k = (turned(a, row, "half", **options) for a in (q, k))
        q, k = featured(q, config.feature), featured(k, config.feature)
        if config.rope == "pairs":
            q, k = (turned(a, row, "pairs", **options) for a in (q, k))
        return q, k

    def _value_gate(self, x: Activations, row: Row) -> Array | None:
        if self.config.key_gate == "count_pow":
            power = self._count_power(row, -1.0)
            return jnp.broadcast_to(power, (len(x), *power.shape[1:]))
        return None if self.key_gate is None else jax.nn.sigmoid(at_least_float32(self.key_gate(x)))

    def _count_power(self, row: Row, sign: float) -> Array:
        """Return n^±σ(c) [B|1 T H]."""
        assert self.exponent is not None
        power = sign * jax.nn.sigmoid(self.exponent[...])
        return jnp.exp(power * jnp.log(row.count.astype(power.dtype))[..., None])

    def _read(
        self,
        heads: _Heads,
        x: Activations,
        row: Row,
        state: TwoMambaState | None,
        implementation: Implementation,
    ) -> tuple[Scaled, TwoMambaState | None]:
        """Return weighted sums of values over their denominator, and the state after."""
        denominator, state = self._denominator(x, row, state, implementation)
        if self.config.has_state:
            return self._read_state(heads, denominator, row, state, implementation)
        if state is None or state.cache is None:
            places, gate = places_in_row(row), heads.gate
        else:
            stored, places = cache.stored(
                state.cache, heads.k, _gated(heads), *documents(row), heads.log_decay
            )
            state = state._replace(cache=stored)
            dtype = heads.q.dtype
            keys, values = stored.keys.astype(dtype), stored.values.astype(dtype)
            heads, gate = _Heads(heads.q, keys, values, stored.log_decay, None), None
        if self.config.kernel == "exp":
            return self._read_softmax(heads, gate, denominator, places, implementation), state
        return self._read_series(heads, gate, denominator, places, implementation), state

    def _denominator(
        self,
        x: Activations,
        row: Row,
        state: TwoMambaState | None,
        implementation: Implementation,
    ) -> tuple[Array | None, TwoMambaState | None]:
        """Return a denominator that does not depend on the weights [B|1 T H|1], or None."""
        kind = self.config.denominator
        if kind == "count":
            return row.count.astype(at_least_float32(x).dtype)[..., None], state
        if kind == "count_pow":
            return self._count_power(row, 1.0), state
        if kind != "gate_sum" or self.out_gate is None:
            return None, state
        # Beyond the limit the gradients of e^x and of a quotient by it are inf and 0.
        gates = jnp.exp(jnp.minimum(at_least_float32(self.out_gate(x)), GATE_LIMIT))
        options: dict[str, Any] = {"segment_ids": row.ids, "initial_segment": row.before}
        options["implementation"] = implementation
        start = None if state is None else state.gate_sum
        sums, end = gated_scan(gates, jnp.zeros_like(gates), initial_state=start, **options)
        state = state if state is None else state._replace(gate_sum=end)
        return jnp.maximum(sums, 1.0), state

    def _read_softmax(
        self,
        heads: _Heads,
        gate: Array | None,
        denominator: Array | None,
        places: Places | None,
        implementation: Implementation,
    ) -> Scaled:
        config = self.config
        options = {
            "scale": self._scale(heads),
            "clamp": config.clamp,
            "value_gate": gate,
            "places": places,
            "log_forget": heads.log_decay,
            "implementation": implementation,
        }
        if config.sums_weights:
            return scaled(attention(heads.q, heads.k, heads.v, **options))
        y, log_sum = attention_with_lse(heads.q, heads.k, heads.v, **options)
        if config.denominator != "sum":
            log = jnp.zeros((1, 1, 1)) if denominator is None else jnp.log(denominator)
            return scaled(y, log_sum - log)
        log = changed_sum(log_sum, floor=config.floor, eps=config.eps, detach=config.detach)
        return scaled(y, jnp.where(log_sum > -jnp.inf, log_sum - log, -jnp.inf))

    def _read_series(
        self,
        heads: _Heads,
        gate: Array | None,
        denominator: Array | None,
        places: Places | None,
        implementation: Implementation,
    ) -> Scaled:
        config = self.config
        v = _gated(heads._replace(gate=gate))
        learnt = None if self.coefficients is None else self.coefficients[...]
        read = polynomial_attention(
            heads.q,
            heads.k,
            v,
            coefficients=coefficients(config.kernel, config.terms, learnt),
            scale=self._scale(heads),
            clamp=config.clamp,
            places=places,
            log_forget=heads.log_decay,
            implementation=implementation,
        )
        return self._divided(read.y, read.total, denominator)

    def _read_state(
        self,
        heads: _Heads,
        denominator: Array | None,
        row: Row,
        state: TwoMambaState | None,
        implementation: Implementation,
    ) -> tuple[Scaled, TwoMambaState | None]:
        config = self.config
        v = _gated(heads)
        k, log_decay = heads.k, heads.log_decay
        if log_decay is not None and self._bounds_growth():
            k, log_decay, state = self._bounded(k, log_decay, row, state)
        op: Any = linear_attention if config.kernel == "pow1" else squared_attention
        read = op(
            heads.q,
            k,
            v,
            scale=self._scale(heads),
            log_decay=log_decay,
            with_total=config.denominator == "sum",
            initial_state=None if state is None else state.sums,
            segment_ids=row.ids,
            initial_segment=row.before,
            implementation=_with_state(implementation, config.kernel, state),
        )
        state = state if state is None else state._replace(sums=read.state)
        return self._divided(read.y, read.total, denominator), state

    def _bounds_growth(self) -> bool:
        config = self.config
        return config.has_state and config.sums_weights and config.decay in GROWING

    def _bounded(
        self, k: Queries, log_decay: Array, row: Row, state: TwoMambaState | None
    ) -> tuple[Queries, Array, TwoMambaState | None]:
        """Return keys and decays that give the same shares and never grow."""
        start = None if state is None else state.excess
        start = jnp.zeros_like(log_decay[:, 0]) if start is None else start
        resets = None if row.spans is None else row.spans.reset
        log_decay, excess = bounded_decay(log_decay, start, resets)
        power = 1.0 if self.config.kernel == "pow1" else 0.5
        k = k * jnp.exp(-power * excess)[..., None].astype(k.dtype)
        state = state if state is None else state._replace(excess=excess[:, -1])
        return k, log_decay, state

    def _divided(self, y: Array, total: Array | None, denominator: Array | None) -> Scaled:
        """Return y over the denominator, or over the sum of the weights where that is one."""
        config = self.config
        if total is None or config.denominator != "sum":
            return scaled(y if denominator is None else y / denominator[..., None])
        if config.kernel in _RECURRENT:  # no weight is negative, but rounding may be
            total = jnp.maximum(total, 0.0)
        total = jnp.maximum(total, config.floor) if config.floor else total
        total = jax.lax.stop_gradient(total) if config.detach else total
        return scaled(divided(y, total + config.eps))

    def _scale(self, heads: _Heads) -> float:
        return 1.0 / math.sqrt(heads.q.shape[-1]) if self.config.scale_products else 1.0

    def _output(self, read: Scaled, x: Activations, v: Queries) -> Activations:
        """Return y from the weighted sums: skip, gates, norms and the last projection."""
        config = self.config
        if self.skip is not None:
            read = scaled(value(read) + self.skip[...] * at_least_float32(v))
        gate = self._gate_logits(x)
        if gate is not None and config.out_gate == "pre_exp":
            read = times_exp(read, jnp.minimum(-gate, GATE_LIMIT))
        elif gate is not None and config.out_gate != "post":
            read = read._replace(x=read.x * jax.nn.sigmoid(gate)[..., None])
        y = head_normed(read, config.norm, self.norm)
        if gate is not None and config.out_gate in ("post", "both"):
            y = y * jax.nn.sigmoid(gate)[..., None]
        y = merge_heads(y)
        if self.z is not None:
            y = y * jax.nn.silu(at_least_float32(self.z(x)))
        if config.norm == "rms_all" and self.norm is not None:
            y = self.norm(y)
        return self.out(y.astype(x.dtype))

    def _gate_logits(self, x: Activations) -> Array | None:
        """Return logits per head of the output's gate [B T H], or None."""
        if self.out_gate is None or self.config.denominator == "gate_sum":
            return None
        return at_least_float32(self.out_gate(x))


def _with_state(
    implementation: Implementation, kernel: Kernel, state: TwoMambaState | None
) -> Implementation:
    """Return what to ask an op for: the kernel over pairs reads whole rows, and cannot decode."""
    if kernel == "pow2" and state is not None and implementation in KERNELS:
        return "xla"
    return implementation


def _has_head_gate(config: TwoMambaConfig) -> bool:
    return config.out_gate in ("pre", "post", "both", "pre_exp") or config.denominator == "gate_sum"


def _decay(config: TwoMambaConfig, dim: int, init: Init, rngs: nnx.Rngs) -> Decay | None:
    if config.decay == "none":
        return None
    return Decay(dim, config.num_heads, config.decay, init=init, rngs=rngs)


def _gated(heads: _Heads) -> Queries:
    """Return values with their gates."""
    if heads.gate is None:
        return heads.v
    return heads.v * heads.gate[..., None].astype(heads.v.dtype)
