"""Keys and values of Memory Mosaics: features of tokens and their neighbours, of unit length."""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.nn.heads import split_heads
from jaxmem.nn.init import Init, decay_ladder, uniform_per_head
from jaxmem.nn.layers import Linear
from jaxmem.nn.window import History, ahead, delays
from jaxmem.ops.dispatch import Implementation
from jaxmem.ops.leaky_average import LeakyState, decay_rate, init_leaky_state, leaky_average
from jaxmem.ops.norms import at_least_float32, clamped_exp, l2_normalise
from jaxmem.shapes import Activations, HeadScalars, Queries, RowInts, SegmentIds

Extractor = Literal["conv", "mix"]
KEY_SCALE_START = 0.1
VALUE_SCALE_START = -0.05


def check_extractor(kind: str, kernel_size: int, path: str) -> None:
    """Raise ConfigError unless there is such an extractor of this size; `path` names its owner.

    `path` ends in `key` or `value`, the beginning of the fields' names.
    """
    if kind not in get_args(Extractor):
        raise ConfigError(
            f"{path}_extractor={kind!r}. Use one of {', '.join(get_args(Extractor))}."
        )
    if kernel_size < 1:
        raise ConfigError(f"{path}_kernel_size={kernel_size}. Use 1 (the token alone) or more.")
    if kind == "mix" and kernel_size > 2:
        raise ConfigError(
            f"{path}_kernel_size={kernel_size} with {path}_extractor='mix', which mixes two "
            "tokens. Leave it at its default, or use the extractor 'conv'."
        )


class FeatureExtractor(nnx.Module):
    r"""Features per head of each token t, looking `shift` = s tokens ahead.

    conv: f_t = b + Σ_j W_j x_{t+s-(J-1)+j},  j = 0 ... J-1, kernel size J
    mix:  f_t = c u_t + (1 - c) u_{t+s},  u = W x + b,  one c in [0, 1) to start with per head

    Tokens before and after the document count as x = 0 and u = 0. The kernel of `conv` is stored
    as (J·inputs, outputs), oldest token first, so that it starts and decays like a projection.

    Reference: Memory Mosaics (arXiv 2405.06394), Library `FeatureExtractor`, `linearconv` and
      `lowrlinearconv`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: Extractor,
        *,
        kernel_size: int,
        shift: int,
        use_bias: bool,
        init: Init,
        rngs: nnx.Rngs,
    ):
        conv = kind == "conv"
        inputs = kernel_size * dim if conv else dim
        self.num_heads = num_heads
        self.shift = shift
        self.span = kernel_size - 1 if conv else shift
        """Earlier tokens that `completed` needs."""
        self.projection = Linear(inputs, dim, use_bias=use_bias, init=init.weight, rngs=rngs)
        self.mix = None if conv else nnx.Param(uniform_per_head(rngs.params(), num_heads))

    def init_history(self, batch: int, dtype: DTypeLike) -> History:
        """Return the history of rows without any token."""
        return jnp.zeros((batch, self.span, self.projection.kernel.shape[1]), dtype)

    def look_ahead(self, x: Activations) -> Queries:
        """Return the features of rows that hold one whole document each."""
        padded = jnp.pad(self._stream(x), ((0, 0), (self.span, self.shift), (0, 0)))
        starts = range(self.shift, self.shift + self.span + 1)
        return self._features([padded[:, n : n + x.shape[1]] for n in starts])

    def completed(
        self,
        x: Activations,
        history: History,
        *,
        segment_ids: SegmentIds | None = None,
        initial_segment: RowInts | None = None,
    ) -> tuple[Queries, History]:
        """Return the feature that each token completes, f_{t-s} at token t, and the history."""
        delayed, history = delays(self._stream(x), history, segment_ids, initial_segment)
        return self._features(delayed), history

    def _stream(self, x: Activations) -> Activations:
        """Return what is remembered of each token: its input, or its projection."""
        return x if self.mix is None else self.projection(x)

    def _features(self, delayed: list[Activations]) -> Queries:
        """Combine the tokens of each window, the oldest first."""
        if self.mix is None:
            joined = jnp.concatenate(delayed, axis=-1)
            return split_heads(self.projection(joined), self.num_heads)
        old, new = (split_heads(u, self.num_heads) for u in (delayed[0], delayed[-1]))
        share = self.mix[...].astype(old.dtype)[:, None]
        return share * old + (1 - share) * new


class KeyState(NamedTuple):
    """What keys need of the tokens before."""

    history: History
    sums: LeakyState


class KeyExtractor(FeatureExtractor):
    """k_t = unit(Σ_{i≤t} λ^{t-i} f_i) per head, with a learnt scale kept apart.

    Keys are float32 or wider whatever the dtype of x: the logits multiply a difference of keys by
    the squared scale, up to e^22, and with it the rounding of the keys.

    Reference: nanoMosaics `KeyFeatureExtractor`; the first step of the Library's
      `InContextAssoMemBlock`.
    """

    def __init__(
        self, dim: int, num_heads: int, kind: Extractor, *, scale_limit: float, **options: Any
    ):
        super().__init__(dim, num_heads, kind, shift=0, **options)
        self.scale_limit = scale_limit
        self.decay = nnx.Param(decay_ladder(num_heads))
        self.scale = nnx.Param(jnp.full((num_heads,), KEY_SCALE_START))

    def init_state(self, batch: int, dtype: DTypeLike) -> KeyState:
        """Return the state before any token; its size does not depend on their number."""
        heads, wide = self.num_heads, jnp.promote_types(dtype, jnp.float32)
        sums = init_leaky_state(batch, heads, self.projection.kernel.shape[1] // heads, dtype=wide)
        return KeyState(self.init_history(batch, dtype), sums)

    def __call__(
        self,
        x: Activations,
        state: KeyState | None,
        *,
        segment_ids: SegmentIds | None = None,
        initial_segment: RowInts | None = None,
        implementation: Implementation = "auto",
    ) -> tuple[Queries, KeyState]:
        """Return unit keys and the state after the last token."""
        features, history = self.completed(
            x,
            self.init_history(x.shape[0], x.dtype) if state is None else state.history,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
        )
        averaged, sums = leaky_average(
            at_least_float32(features),
            decay_rate(self.decay[...]),
            initial_state=None if state is None else state.sums,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
            implementation=implementation,
        )
        return l2_normalise(averaged), KeyState(history, sums)

    def logit_scale(self) -> HeadScalars:
        """Return exp(min(2 · 10 · scale, limit)), the factor of the logits.

        The scale is that of a key and of a query alike, hence squared. Differs: the Library clamps
        before squaring, at half of this limit, which is the same.
        """
        return clamped_exp(self.scale[...], 2, self.scale_limit)


class ValueExtractor(FeatureExtractor):
    """v_t = exp(10 s) · unit(f_t) per head, with features f that look `shift` tokens ahead.

    Reference: nanoMosaics `ValFeatureExtractor`; the third step of the Library's
      `InContextAssoMemBlock`.
    """

    def __init__(self, dim: int, num_heads: int, kind: Extractor, **options: Any):
        super().__init__(dim, num_heads, kind, **options)
        self.scale = nnx.Param(jnp.full((num_heads,), VALUE_SCALE_START))

    def __call__(self, x: Activations, segment_ids: SegmentIds | None = None) -> Queries:
        """Return the values of whole rows; those that look beyond their document are never read."""
        if segment_ids is None:
            return self.scaled(self.look_ahead(x))
        nothing = self.init_history(x.shape[0], x.dtype)
        features, _ = self.completed(x, nothing, segment_ids=segment_ids)
        return self.scaled(ahead(features, self.shift, segment_ids != 0))

    def scaled(self, features: Queries) -> Queries:
        """Bring features to the length of a value."""
        scale = jnp.exp(10.0 * self.scale[...])[:, None]
        return l2_normalise(features) * scale.astype(features.dtype)
