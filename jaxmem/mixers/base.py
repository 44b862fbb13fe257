"""The mixer contract: one layer, three ways to run it, and a registry of all of them.

A mixer maps activations [B T D] to activations [B T D] and may carry a state from token to token.
It runs on a whole sequence (`parallel`), chunk by chunk (`chunked`) or one token at a time
(`step`), with equal results; the laws are listed, and tested for every registered mixer, in
tests/laws.
"""

import dataclasses
import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError, ShapeError, unknown_name
from jaxmem.nn.init import Init
from jaxmem.ops.checks import check_floating
from jaxmem.ops.dispatch import Implementation
from jaxmem.shapes import Activations, ActivationsAt, Key, SegmentIds, TokensAt

Form = Literal["parallel", "chunked"]
LAWS = ("forms", "splitting", "causality", "packing", "state", "no_surprises", "batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Fields that every mixer has."""

    paper: ClassVar[str] = ""
    """Where the layer was published, for the zoo table."""
    parity: ClassVar[str] = ""
    """What proves it equal to its authors' code, for the zoo table."""

    form: Form = "parallel"
    """How a whole sequence is run: all at once, or chunk by chunk with less memory."""
    chunk_size: int = 64
    """Tokens per chunk of the chunked form; speed and memory only, never the result."""
    implementation: Implementation = "auto"
    """Which implementation of its ops to run; a named one runs or raises."""

    def __post_init__(self) -> None:
        """Check what needs no knowledge of the model width."""
        if self.chunk_size < 1:
            raise ConfigError(f"chunk_size={self.chunk_size} is not positive. Use 1 or more.")

    def check(self, dim: int, path: str) -> None:
        """Raise ConfigError if the mixer cannot be built at this width; `path` names it."""

    @property
    def supports(self) -> frozenset[str]:
        """Names of the laws that hold for this configuration, out of `LAWS`."""
        return frozenset(LAWS)


class MixerOutput(NamedTuple):
    """What a call of a mixer returns."""

    y: Array
    """[B T D], or [B D] from `step`."""
    state: Any
    """The state after the last token; None if the call was given none."""
    aux: dict[str, Array]
    """Scalars; names starting with `loss_` are added to the training loss, others are metrics."""


class Mixer(nnx.Module):
    """Base of all mixers. Subclasses implement `init_state` and `mix` and hold only parameters.

    State is a value that is passed in and handed back. Every leaf has the batch as leading axis, so
    rows may be at different lengths. A padded token (segment id 0) gives y = 0 and changes nothing.
    """

    def __init__(self, config: MixerConfig, dim: int, *, init: Init, rngs: nnx.Rngs):
        config.check(dim, "mixer")
        self.config = config
        self.dim = dim

    @abstractmethod
    def init_state(
        self, batch: int, *, max_len: int | None = None, dtype: DTypeLike | None = None
    ) -> Any:
        """Return the state before any token.

        Args:
          batch: rows.
          max_len: tokens per row the state must hold; needed by mixers with a cache.
          dtype: dtype of caches, that of the parameters by default; recurrences are kept in
            float32 or wider.
        """

    @abstractmethod
    def mix(
        self,
        x: Activations,
        state: Any,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run all tokens at once, from `state` (None: no history, and none is returned).

        Outputs at padded tokens are set to 0 by the caller.
        """

    def __call__(
        self,
        x: Activations,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: SegmentIds | None = None,
        rngs: nnx.Rngs | None = None,
        form: Form | None = None,
        implementation: Implementation | None = None,
    ) -> MixerOutput:
        """Run a sequence of tokens.

        Args:
          x: activations; T may be 0 if a state is given.
          state: history from `init_state` or an earlier call; None: no history, and the returned
            state is None, so that training pays for no cache.
          segment_ids: document of each token, 0 for padding. None: all tokens continue the
            state's document.
          positions: place of each token in its document, for mixers that use it. None: counted on
            from the state.
          rngs: source of dropout masks; None is evaluation, and nothing random is drawn.
          form: overrides the configured form.
          implementation: overrides the configured implementation.

        Raises:
          ShapeError: x does not have the width of the mixer.
          DTypeError: x is not floating point.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeError(
                f"{type(self).__name__} expects activations [B T {self.dim}], found {x.shape}."
            )
        check_floating(type(self).__name__, x=x)
        implementation = implementation or self.config.implementation
        if x.shape[1] == 0:
            return MixerOutput(x, state, {})
        run = self._chunks if (form or self.config.form) == "chunked" else self._whole
        return run(
            x,
            state,
            segment_ids=segment_ids,
            positions=positions,
            rngs=rngs,
            implementation=implementation,
        )

    def step(
        self, x: ActivationsAt, state: Any, *, segment_ids: TokensAt | None = None
    ) -> MixerOutput:
        """Run one token per row: the decode step, equal to a sequence of length one."""
        ids = None if segment_ids is None else segment_ids[:, None]
        out = self(x[:, None], state, segment_ids=ids, form="parallel")
        return out._replace(y=out.y[:, 0])

    def state_bytes(self, batch: int, max_len: int) -> int:
        """Return the size of a state in bytes without allocating it."""
        state = jax.eval_shape(lambda: self.init_state(batch, max_len=max_len))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    def _whole(
        self, x: Activations, state: Any, *, segment_ids: SegmentIds | None, **options: Any
    ) -> MixerOutput:
        out = self.mix(x, state, segment_ids=segment_ids, **options)
        if segment_ids is None:
            return out
        return out._replace(y=jnp.where((segment_ids != 0)[..., None], out.y, 0))

    def _chunks(
        self,
        x: Activations,
        state: Any,
        *,
        segment_ids: SegmentIds | None,
        positions: SegmentIds | None,
        rngs: nnx.Rngs | None,
        implementation: Implementation,
    ) -> MixerOutput:
        """Run full chunks in a `lax.scan` over the state, then the ragged rest.

        Without a state one is made for the length of this call and dropped afterwards.
        """
        length, chunk = x.shape[1], self.config.chunk_size
        start = (
            state
            if state is not None
            else self.init_state(x.shape[0], max_len=length, dtype=x.dtype)
        )
        keys = None if rngs is None else (rngs.dropout(), call_key(rngs))
        streams = (x, segment_ids, positions)
        full = length // chunk

        def body(carry: tuple[Any, Array], part: tuple) -> tuple[tuple[Any, Array], tuple]:
            before, number = carry
            tokens, ids, places = part
            draws = None
            if keys is not None:
                draws = nnx.Rngs(dropout=jax.random.fold_in(keys[0], number), call=keys[1])
            out = self._whole(
                tokens,
                before,
                segment_ids=ids,
                positions=places,
                rngs=draws,
                implementation=implementation,
            )
            return (out.state, number + 1), (out.y, out.aux)

        carry, outputs, weights = (start, jnp.int32(0)), [], []
        if full:
            parts = jax.tree.map(lambda a: _split(a, full, chunk), streams)
            carry, (y, aux) = lax.scan(body, carry, parts)
            outputs.append(jnp.moveaxis(y, 0, 1).reshape(x.shape[0], full * chunk, -1))
            weights.append((full * chunk, jax.tree.map(lambda a: jnp.mean(a, axis=0), aux)))
        if length % chunk:
            rest = jax.tree.map(lambda a: a[:, full * chunk :], streams)
            carry, (y, aux) = body(carry, rest)
            outputs.append(y)
            weights.append((length % chunk, aux))
        averaged = jax.tree.map(
            lambda *leaves: sum(n * a for (n, _), a in zip(weights, leaves, strict=True)) / length,
            *(aux for _, aux in weights),
        )
        end = None if state is None else carry[0]
        return MixerOutput(jnp.concatenate(outputs, axis=1), end, averaged)


_BEYOND_ALL_COUNTS = 2**31 - 1
"""A stream of keys numbers them from 0, so this number makes a key of none of its draws."""


def call_key(rngs: nnx.Rngs) -> Key:
    """Return a key that all mixers and chunks of one call of a model see alike.

    It is for what a training step draws once; dropout masks come from `rngs.dropout()`, whose keys
    differ from call to call.
    """
    if "call" in rngs:  # of a chunk
        return rngs.call.key[...]
    return jax.random.fold_in(rngs.dropout.key[...], _BEYOND_ALL_COUNTS)


def _split(a: Array, number: int, chunk: int) -> Array:
    """Cut [B T ...] into [N B C ...], dropping what does not fill a chunk."""
    cut = a[:, : number * chunk].reshape(a.shape[0], number, chunk, *a.shape[2:])
    return jnp.moveaxis(cut, 1, 0)


class _Entry(NamedTuple):
    config: type[MixerConfig]
    mixer: type[Mixer]


_REGISTRY: dict[str, _Entry] = {}
MixerClass = TypeVar("MixerClass", bound=type[Mixer])


def register(name: str, config: type[MixerConfig]) -> Callable[[MixerClass], MixerClass]:
    """Register a mixer class under a unique name, with its config class of the same file."""

    def decorate(mixer: MixerClass) -> MixerClass:
        if name in _REGISTRY:
            raise ConfigError(
                f"Two mixers are called {name!r}: {_REGISTRY[name].mixer.__module__} and "
                f"{mixer.__module__}. Give one of them another name."
            )
        if config.__module__ != mixer.__module__:
            raise ConfigError(
                f"Mixer {name!r} stands in {mixer.__module__}, its config in {config.__module__}. "
                "Put both into one file."
            )
        _REGISTRY[name] = _Entry(config, mixer)
        return mixer

    return decorate


@cache
def _discover() -> None:
    package = importlib.import_module("jaxmem.mixers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"jaxmem.mixers.{module.name}")


def _entry(name: str) -> _Entry:
    _discover()
    if name not in _REGISTRY:
        raise unknown_name("mixer", name, _REGISTRY)
    return _REGISTRY[name]


def names() -> list[str]:
    """Return the names of all registered mixers, sorted."""
    _discover()
    return sorted(_REGISTRY)


def config_class(name: str) -> type[MixerConfig]:
    """Return the config class of a registered name; UnknownName with close matches otherwise."""
    return _entry(name).config


def config_name(config: type[MixerConfig]) -> str:
    """Return the registered name of a config class."""
    _discover()
    return next(name for name, entry in _REGISTRY.items() if entry.config is config)


def mixer_class(name: str) -> type[Mixer]:
    """Return the module class of a registered name."""
    return _entry(name).mixer


def build(config: MixerConfig, dim: int, *, init: Init, rngs: nnx.Rngs) -> Mixer:
    """Build the mixer that a config describes, at model width `dim`."""
    return mixer_class(config_name(type(config)))(config, dim, init=init, rngs=rngs)
