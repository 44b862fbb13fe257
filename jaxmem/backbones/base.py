"""What every model config offers, whatever is trained on it, and their registry."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxmem.errors import ConfigError
from jaxmem.registry import Registry

M = TypeVar("M", bound="ModelConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Base of all model configs."""

    context_len: int = 64
    """Positions per training row."""

    @abstractmethod
    def build(self, rngs: nnx.Rngs, compute_dtype: DTypeLike = jnp.float32) -> nnx.Module:
        """Build the model: float32 `nnx.Param`s and no other variables.

        Args:
          rngs: source of the initial parameters.
          compute_dtype: type of the activations.

        Raises:
          ConfigError: a size that the task gives is still missing.
        """


@runtime_checkable
class Recurrent(Protocol):
    """A model with a state, as far as the size of that is reported."""

    def init_state(self, batch: int) -> Any:
        """Return the state of `batch` rows before any token."""
        ...


_MODELS: Registry[ModelConfig] = Registry("model", "jaxmem.backbones")
register_model = _MODELS.register
model_names = _MODELS.names
model_class = _MODELS.config_class
model_name = _MODELS.name_of


def with_vocabulary(model: M, size: int, *, owner: str) -> M:
    """Complete a model config whose `vocab_size` may be 0, which means that of the `owner`.

    Args:
      model: the config.
      size: tokens that the model must know.
      owner: what has these tokens, such as the tokenizer, for messages.

    Raises:
      ConfigError: the model has no vocabulary, or a smaller one.
    """
    wanted = getattr(model, "vocab_size", None)
    if wanted is None:
        raise ConfigError(
            f"A model of kind {model_name(type(model))!r} reads no tokens, but the {owner} has "
            f"{size}. Use a model with a vocabulary, such as a decoder."
        )
    if wanted and wanted < size:
        raise ConfigError(
            f"`model.vocab_size={wanted}` is smaller than the {owner}'s {size}. "
            f"Use 0 to take the {owner}'s, or a larger number."
        )
    return dataclasses.replace(model, vocab_size=wanted or size)
