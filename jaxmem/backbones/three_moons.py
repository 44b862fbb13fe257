"""One contextual memory over a continuous series, and three ways to let it go on by itself.

Three matrices and nothing else: no embedding table, norm, positions or leaky average. With three
heads each comes to hold one moon; with a single one the memory has to wait for the whole system.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxmem.backbones.base import ModelConfig, register_model
from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.attention import Places, attention
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import Activations, ActivationsAt, Keys

NORM_EPS = 1e-3
"""Added to the length of a key or value that is normalised."""

Method = Literal["cached", "recompute", "released"]


@register_model("three_moons")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeMoonsConfig(ModelConfig):
    """A contextual memory over vectors: how many heads, and how it compares and reads."""

    context_len: int = 240
    """Time steps per training window."""
    input_dim: int = 6
    """Numbers per time step, in and out; three moons have six."""
    num_heads: int = 3
    """Memories that read side by side."""
    head_dim: int = 2
    """Width of keys and values per head."""
    complex_linear: bool = True
    """Keep every 2 x 2 block of all matrices a rotation times a factor."""
    use_embedding: bool = False
    """A linear map to num_heads x head_dim before keys and values."""
    normalise_keys: bool = False
    """Divide keys by their length + 0.001."""
    normalise_values: bool = False
    """Divide values by their length + 0.001."""
    learn_key_scale: bool = False
    """Multiply keys by e^s with a learnt s, at first 1."""
    attention_scale: float = 50.0
    """Factor of the attention logits."""
    value_shift: int = 1
    """How many steps after its key a stored value was seen; 1 stores what comes next."""
    value_ban: int = 0
    """Newest complete pairs that may not be read."""
    output: Literal["projection", "sum", "concat"] = "projection"
    """Mix the heads by a matrix, add them up (head_dim must then be input_dim), or put them side by
    side (num_heads x head_dim must then be input_dim)."""

    def __post_init__(self) -> None:
        """Check sizes."""
        for field in ("context_len", "input_dim", "num_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field}={getattr(self, field)} is not positive.")
        for field in ("value_shift", "value_ban"):
            if getattr(self, field) < 0:
                raise ConfigError(
                    f"model.{field}={getattr(self, field)} is negative. Use 0 or more."
                )
        if self.output == "sum" and self.head_dim != self.input_dim:
            raise ConfigError(
                f"model.head_dim={self.head_dim} differs from model.input_dim={self.input_dim}, so "
                "heads cannot be added up to an output. Use `--model.output projection`."
            )
        if self.output == "concat" and self.width != self.input_dim:
            raise ConfigError(
                f"num_heads x head_dim={self.width} differs from model.input_dim={self.input_dim}, "
                "so heads side by side are no output. Use `--model.output projection`."
            )
        if self.complex_linear and (self.input_dim % 2 or self.width % 2):
            raise ConfigError(
                f"model.complex_linear needs even widths; model.input_dim={self.input_dim} and "
                f"num_heads x head_dim={self.width}. Make them even, or switch it off."
            )

    def build(self, rngs: nnx.Rngs, compute_dtype: DTypeLike = jnp.float32) -> "ThreeMoons":
        """Build the memory."""
        return ThreeMoons(self, rngs=rngs, compute_dtype=compute_dtype)

    @property
    def width(self) -> int:
        """Keys of all heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def lag(self) -> int:
        """How many steps a key must be behind the query; so many first outputs are 0."""
        return self.value_shift + self.value_ban


def project_complex(weight: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """Replace every 2 x 2 block [[a, b], [c, d]] by the nearest [[p, q], [-q, p]].

    p = (a + d) / 2 and q = (b - c) / 2: multiplication by a complex number. Applying it twice
    changes nothing more, and it is its own transpose.

    Reference: ThreeMoons, complex linear layer.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 2, 2, columns // 2, 2)
    p = (blocks[:, 0, :, 0] + blocks[:, 1, :, 1]) / 2
    q = (blocks[:, 0, :, 1] - blocks[:, 1, :, 0]) / 2
    return jnp.stack([jnp.stack([p, q], -1), jnp.stack([-q, p], -1)], axis=1).reshape(rows, columns)


class Projection(nnx.Module):
    """y = x W without bias, W projected onto complex matrices at each call if so configured.

    Entries start from U(-1/sqrt(inputs), 1/sqrt(inputs)), projected.
    """

    def __init__(self, inputs: int, outputs: int, *, complex_linear: bool, rngs: nnx.Rngs):
        self.complex_linear = complex_linear
        bound = 1.0 / math.sqrt(inputs)
        kernel = jax.random.uniform(
            rngs.params(), (inputs, outputs), jnp.float32, minval=-bound, maxval=bound
        )
        self.kernel = nnx.Param(project_complex(kernel) if complex_linear else kernel)

    def matrix(self) -> Float[Array, "I O"]:
        """Return the matrix that is applied."""
        kernel = self.kernel[...]
        return project_complex(kernel) if self.complex_linear else kernel

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Apply the projection on the last axis."""
        return x @ self.matrix().astype(x.dtype)


class ThreeMoonsState(NamedTuple):
    """Caches of all keys and of everything stored, written at the step that brought them."""

    key: Float[Array, "B N H K"]
    arrived: Float[Array, "B N H K"]
    """What step t brought: the value that belongs to the key of step t - value_shift."""
    length: Int[Array, ""]
    """Steps seen so far, the same for all rows."""


class ThreeMoons(nnx.Module):
    r"""y_t = W_o Σ_j softmax_j(c k_t·k_j) v_j over j <= t - value_shift - value_ban.

    k_t = W_k x_t and v_j = W_v x_{j + value_shift}: a stored value is what followed its key. The
    sum runs per head and W_o mixes the heads. Outputs without any pair to read are 0.

    Args:
      config: sizes and options.
      rngs: source of the initial parameters.
      compute_dtype: dtype of the activations; parameters are float32.

    Reference: Memory Mosaics (arXiv 2405.06394), sec. 5; ThreeMoons `ContextMemory`.
    """

    def __init__(
        self, config: ThreeMoonsConfig, *, rngs: nnx.Rngs, compute_dtype: DTypeLike = jnp.float32
    ):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)

        def linear(inputs: int, outputs: int) -> Projection:
            return Projection(inputs, outputs, complex_linear=config.complex_linear, rngs=rngs)

        width = config.width
        inner = width if config.use_embedding else config.input_dim
        self.embedding = linear(config.input_dim, width) if config.use_embedding else None
        self.key = linear(inner, width)
        self.value = linear(inner, width)
        self.output = linear(width, config.input_dim) if config.output == "projection" else None
        self.key_scale = nnx.Param(jnp.ones((), jnp.float32)) if config.learn_key_scale else None

    def __call__(self, x: Activations) -> Activations:
        """Predict the successor of every step of a whole series.

        Raises:
          ShapeError: x is not [B T input_dim].
        """
        key, value = self.pairs(x)
        return self._mix(self._read(key, key, value))

    def pairs(self, x: Activations) -> tuple[Keys, Keys]:
        """Return the keys and the values stored with them, 0 for the last `value_shift` steps."""
        key, arrived = self._encode(x)
        shift = min(self.config.value_shift, x.shape[1])
        return key, jnp.pad(arrived[:, shift:], ((0, 0), (0, shift), (0, 0), (0, 0)))

    def attention_weights(self, x: Activations) -> Float[Array, "B H T T"]:
        """Return the weights with which step t (third axis) reads step j (fourth)."""
        key, _ = self._encode(x)
        steps = x.shape[1]
        # Reading the unit vectors gives the weights themselves.
        units = jnp.broadcast_to(jnp.eye(steps, dtype=key.dtype), (*key.shape[:1], steps, steps))
        units = jnp.repeat(units[:, :, None], self.config.num_heads, axis=2)
        return jnp.swapaxes(self._read(key, key, units), 1, 2)

    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> ThreeMoonsState:
        """Return the state before any step, with room for `max_len` (default `context_len`)."""
        slots = self.config.context_len if max_len is None else max_len
        slots = max(slots, self.config.value_shift + 1)  # room for one complete pair at least
        shape = (batch, slots, self.config.num_heads, self.config.head_dim)
        empty = jnp.zeros(shape, self.compute_dtype if dtype is None else dtype)
        return ThreeMoonsState(empty, empty, jnp.zeros((), jnp.int32))

    def extend(self, x: Activations, state: ThreeMoonsState) -> tuple[Activations, ThreeMoonsState]:
        """Predict the successors of the next steps of a series; equal to the whole at once.

        What arrives completes the pair of the key that stands `value_shift` steps back. Outputs
        are NaN if the state has no room left.

        Raises:
          ShapeError: x is not [B T input_dim], or longer than the whole state.
        """
        key, arrived = self._encode(x)
        state = _append(state, key, arrived)
        return self._read_cache(key, state, self.config.lag), state

    def step(
        self, x: ActivationsAt, state: ThreeMoonsState
    ) -> tuple[ActivationsAt, ThreeMoonsState]:
        """Predict the successor of one more step."""
        y, state = self.extend(x[:, None], state)
        return y[:, 0], state

    def released_step(
        self, x: ActivationsAt, state: ThreeMoonsState
    ) -> tuple[ActivationsAt, ThreeMoonsState]:
        """Take one step of the authors' released cached generation, with its two slips.

        What arrives is never stored, so values of generated steps, and of those that wait for
        them, stay 0 and yet are read; and `value_ban` is not heeded.
        """
        key, arrived = self._encode(x[:, None])
        state = _append(state, key, jnp.zeros_like(arrived))
        return self._read_cache(key, state, self.config.value_shift)[:, 0], state

    def _encode(self, x: Activations) -> tuple[Keys, Keys]:
        """Return the key of each step and what the step brings to the key before it."""
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[-1] != self.config.input_dim:
            raise ShapeError(
                f"ThreeMoons expects a series [B T {self.config.input_dim}] of one step or more, "
                f"found {x.shape}."
            )
        x = x.astype(self.compute_dtype)
        if self.embedding is not None:
            x = self.embedding(x)
        key, arrived = self._heads(self.key(x)), self._heads(self.value(x))
        if self.config.normalise_keys:
            key = _shorten(key)
        if self.key_scale is not None:
            key = key * jnp.exp(self.key_scale[...]).astype(key.dtype)
        if self.config.normalise_values:
            arrived = _shorten(arrived)
        return key, arrived

    def _heads(self, x: Float[Array, "B T D"]) -> Keys:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

    def _read(self, query: Keys, key: Keys, value: Float[Array, "B S H V"]) -> Array:
        scale = self.config.attention_scale
        return attention(query, key, value, scale=scale, lag=self.config.lag)

    def _read_cache(self, query: Keys, state: ThreeMoonsState, lag: int) -> Activations:
        """Return outputs from the pairs `lag` steps or more behind each of the newest steps."""
        shift = self.config.value_shift
        rows, new = query.shape[:2]
        slots = state.key.shape[1] - shift
        key, value = state.key[:, :slots], state.arrived[:, shift:]
        at = state.length - new + jnp.arange(new)
        places = Places(
            query=jnp.broadcast_to(at, (rows, new)),
            key=jnp.broadcast_to(jnp.arange(slots), (rows, slots)),
            query_segment=jnp.ones((rows, new), jnp.int32),
            key_segment=jnp.ones((rows, slots), jnp.int32),
        )
        scale = self.config.attention_scale
        y = self._mix(attention(query, key, value, scale=scale, lag=lag, places=places))
        # A full cache would silently be written over at its end.
        return jnp.where(state.length > state.key.shape[1], jnp.nan, y)

    def _mix(self, read: Float[Array, "B T H K"]) -> Activations:
        if self.config.output == "sum":
            return jnp.sum(read, axis=2)
        y = read.reshape(*read.shape[:2], -1)
        return y if self.output is None else self.output(y)


def continue_series(
    model: ThreeMoons, prompt: Activations, steps: int, *, method: Method = "cached"
) -> Float[Array, "B N D"]:
    """Let the model go on from a prompt, each output being the next input.

    Args:
      model: the memory.
      prompt: the first steps of a series, at least one.
      steps: how many to add.
      method: `cached` keeps keys and values, and stores each value when it arrives; `recompute`
        runs the whole series for each step, with the same result. `released` is what the authors'
        code does, kept for comparison: it feeds the prompt's last output before it returns
        anything, so its first output stands one step further on, and it never stores what arrives.

    Returns:
      [B steps input_dim]. Output i continues the prompt by i + 1 steps; by i + 2 for `released`.
    """
    rows, length = prompt.shape[:2]
    if method == "recompute":
        return _recompute(model, prompt, steps)
    state = model.init_state(rows, max_len=length + steps)
    y, state = model.extend(prompt, state)
    if method == "released":
        return _run(model.released_step, y[:, -1], state, steps)
    rest = _run(model.step, y[:, -1], state, steps - 1)
    return jnp.concatenate([y[:, -1:], rest], axis=1)


def _run(
    step: Callable[[Array, ThreeMoonsState], tuple[Array, ThreeMoonsState]],
    first: Array,
    state: ThreeMoonsState,
    steps: int,
) -> Array:
    """Feed outputs back for some steps and return them, [B steps D]."""

    def body(carry: tuple[Array, ThreeMoonsState], _: None) -> tuple[tuple, Array]:
        y, after = step(*carry)
        return (y, after), y

    _, outputs = lax.scan(body, (first, state), length=steps)
    return jnp.moveaxis(outputs, 0, 1)


def _recompute(model: ThreeMoons, prompt: Array, steps: int) -> Array:
    """Run the whole series, padded to its final length, once per step."""
    length = prompt.shape[1]
    series = jnp.pad(prompt, ((0, 0), (0, steps), (0, 0)))

    def body(series: Array, at: Array) -> tuple[Array, None]:
        # What stands after `at` is still 0 and, the memory being causal, cannot be read.
        y = lax.dynamic_slice_in_dim(model(series), at, 1, axis=1)
        return lax.dynamic_update_slice_in_dim(series, y.astype(series.dtype), at + 1, axis=1), None

    series, _ = lax.scan(body, series, length - 1 + jnp.arange(steps))
    return series[:, length:]


def _append(state: ThreeMoonsState, key: Array, arrived: Array) -> ThreeMoonsState:
    at = state.length
    if key.shape[1] > state.key.shape[1]:
        raise ShapeError(
            f"{key.shape[1]} steps do not fit into a state with room for {state.key.shape[1]}. "
            "Make it with a larger max_len."
        )

    def put(cache: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), at, axis=1)

    return ThreeMoonsState(put(state.key, key), put(state.arrived, arrived), at + key.shape[1])


def _shorten(x: Keys) -> Keys:
    """Divide by |x| + 0.001, with gradient 0 rather than NaN at 0."""
    wide = at_least_float32(x)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    longer = square > 0.0
    length = jnp.where(longer, jnp.sqrt(jnp.where(longer, square, 1.0)), 0.0)
    return (wide / (length + NORM_EPS)).astype(x.dtype)
