"""Families of original checkpoints: their names, and which of our models compute what they do."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.interop import memory_mosaics as mosaics
from jaxmem.interop import two_mamba
from jaxmem.interop.attention_types import ATTENTION, UNLISTED, from_name
from jaxmem.interop.names import Names
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.base import MixerConfig, config_name
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import (
    LIBRARY_LIMIT,
    NANO_LIMIT,
    ContextualMemoryConfig,
    PersistentMemoryConfig,
)
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.mixers.two_mamba import TwoMambaConfig

Values = Mapping[str, tuple[Any, ...]]
"""Dotted field of a config -> values, or classes of values, that it may have."""


class Family(NamedTuple):
    """Checkpoints that share their names and the function of their models."""

    title: str
    mark: str
    """Regular expression of a name that occurs in checkpoints of this family alone."""
    names: Callable[[DecoderConfig], Names]
    """From a model's config, which `requires` allows, to its original names."""
    requires: Values
    """With what a model computes what the original does. Sizes and biases are left to the shapes
    and names of the tensors."""
    forms: tuple[Values, ...] = ()
    """What else it needs, in as many ways as there are; empty: nothing."""

    def differences(self, config: Any) -> list[str]:
        """Say what keeps a model of this config from being of the family."""
        if not isinstance(config, DecoderConfig):
            return [f"it is a {type(config).__name__} instead of a DecoderConfig"]
        nearest = min((_differences(config, form) for form in self.forms), key=len, default=[])
        return _differences(config, self.requires) or nearest


def _differences(config: DecoderConfig, wanted: Values) -> list[str]:
    """Say which fields of a config have other values than those wanted."""
    found = []
    for path, allowed in wanted.items():
        try:
            value = reduce(getattr, path.split("."), config)
        except AttributeError:  # of a mixer of another class, or none, which is judged as such
            continue
        if value not in allowed and type(value) not in allowed:
            words = " or ".join(map(_word, allowed))
            found.append(f"model.{path} is {_word(value)} instead of {words}")
    return found


def _word(value: Any) -> str:
    """Name a value, or a mixer by its registered name."""
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, MixerConfig):
        return config_name(kind)
    return "None" if kind is type(None) else repr(value)


_LAYER_NORM = {"norm_type": ("layer",), "norm_eps": (1e-5,)}
_PLAIN = {"norm": ("pre",), "tie_embedding": (True,), "scale_logits": (False,)} | _LAYER_NORM
_MOSAIC = {"mixer": (ContextualMemoryConfig,), "positions": ("none",)} | _LAYER_NORM
_KEYS_OF_ONE_TOKEN = {
    f"{slot}.{field}": (value,)
    for slot in ("mixer", "feed_forward")
    for field, value in (("key_extractor", "conv"), ("key_kernel_size", 1))
}
_LAYER = r"model\.layers\.[0-9]+"
_NANO = (
    _MOSAIC
    | _PLAIN
    | _KEYS_OF_ONE_TOKEN
    | {
        "feed_forward": (PersistentMemoryConfig,),
        "mixer.scale_limit": (2 * NANO_LIMIT,),
        "feed_forward.scale_limit": (NANO_LIMIT,),
        "mixer.value_extractor": ("mix",),
        "mixer.lag": (1,),
    }
)
_LIBRARY = _MOSAIC | {
    "feed_forward": (PersistentMemoryConfig, type(None)),
    "mixer.scale_limit": (LIBRARY_LIMIT,),
    "feed_forward.scale_limit": (LIBRARY_LIMIT,),
    "scale_logits": (True,),
}
_GPT = _PLAIN | {
    "mixer": (AttentionConfig,),
    "feed_forward": (MLPConfig,),
    "feed_forward.hidden_mult": (4,),
    "positions": ("learned",),
}
_LLAMA = {
    "norm": ("pre",),
    "norm_type": ("rms",),
    "norm_eps": (1e-5,),
    "feed_forward": (SwiGLUConfig,),
    "positions": ("none",),
    "scale_logits": (False,),
}
_MAMBA = _LLAMA | {
    "mixer": (TwoMambaConfig,),
    "mixer.feature": ("id", "relu", "silu"),
    "mixer.rope": ("none", "pairs"),
    # Positions may be rounded or not: the original rounds them where it computes in bfloat16.
    "mixer.rope_theta": (10000.0,),
    "mixer.scale_products": (True,),
    "mixer.clamp": (None,),
    "mixer.kernel": ("exp", "pow1", "pow2"),
    "mixer.decay": (
        "none",
        "discretize",
        "neg_softplus",
        "neg_softplus_dt",
        "neg_softplus2",
        "neg_silu",
    ),
    "mixer.floor": (0.0,),
    "mixer.eps": (0.0,),
    "mixer.detach": (False,),
    "mixer.key_gate": ("none",),
    "mixer.out_gate": ("none", "z"),
    "mixer.norm_eps": (TwoMambaConfig.norm_eps,),
}
_MAMBA_NORMS: tuple[Values, ...] = (
    {"mixer.denominator": ("sum",), "mixer.norm": ("none",)},
    {"mixer.denominator": ("one",), "mixer.norm": ("rms_all",)},
)
_ATTENTION = _LLAMA | {"mixer": (TwoMambaConfig,)}
_MAMBA2 = _LLAMA | {"mixer": (Mamba2Config,), "mixer.norm_eps": (1e-5,)}


def _attention_form(config: TwoMambaConfig) -> Values:
    """Return all that an attention type says of its layer, but for sizes."""
    common = {field.name for field in dataclasses.fields(MixerConfig)}
    # Learnt coefficients are as many as their tensor has.
    sizes = {"num_heads"} if config.kernel == "taylor" else {"num_heads", "terms"}
    own = {field.name for field in dataclasses.fields(config)} - common - sizes
    return {f"mixer.{field}": (getattr(config, field),) for field in sorted(own)}


_LISTED = (from_name(name, "attention") for name in ATTENTION | UNLISTED)
# Coefficients per head are those of another class, with one projection for all.
_ATTENTION_FORMS = tuple(_attention_form(row) for row in _LISTED if row.kernel != "head_series")


def _library(config: Any, *, eft: bool) -> Names:
    """Return the Library's names with the extractors of this model."""
    key = config.mixer.key_extractor
    contextual = mosaics.library_contextual(key, config.mixer.value_extractor, eft=eft)
    key = getattr(config.feed_forward, "key_extractor", key)
    persistent = mosaics.library_persistent(key, eft=eft)
    return mosaics.library_model(mosaics.library_block(contextual, persistent))


FAMILIES = {
    "nano_mosaic": Family(
        "nanoMosaics' MemoryMosaic", r"mosaic\.wte\.weight", lambda _: mosaics.MOSAIC, _NANO
    ),
    "library": Family(
        "Memory Mosaics' Library, variant regular",
        r"blocks\.[0-9]+\.attn\.leaky_key_beta",
        lambda config: _library(config, eft=False),
        _LIBRARY,
    ),
    "library_eft": Family(
        "Memory Mosaics' Library, variant eft",
        r"blocks\.[0-9]+\.attn\.leaky_average\..*",
        lambda config: _library(config, eft=True),
        _LIBRARY | _KEYS_OF_ONE_TOKEN,
    ),
    "gpt": Family(
        "the GPT of nanoGPT, nanoMosaics and the Library",
        r"transformer\.wte\.weight",
        lambda _: mosaics.GPT,
        _GPT,
    ),
    "two_mamba": Family(
        "2Mamba's models of the build-up",
        rf"{_LAYER}\.self_attn\.qkv_proj\.weight",
        lambda _: two_mamba.model(two_mamba.MAMBA),
        _MAMBA,
        _MAMBA_NORMS,
    ),
    "two_mamba_attention": Family(
        "2Mamba's models of the attention types",
        rf"{_LAYER}\.self_attn\.q_proj\.weight",
        lambda _: two_mamba.model(two_mamba.ATTENTION),
        _ATTENTION,
        _ATTENTION_FORMS,
    ),
    "two_mamba_mamba2": Family(
        "2Mamba's models of Mamba-2",
        rf"{_LAYER}\.self_attn\.mamba_layer\.in_proj\.weight",
        lambda _: two_mamba.model(two_mamba.MAMBA2.under("mamba_layer")),
        _MAMBA2,
    ),
}
"""All families by name. What has no parameters cannot be told by names, such as the two GELUs of
the GPTs, or powers and feature maps of 2Mamba: see to it that `model.feed_forward.activation` is
that of the checkpoint, and `model.mixer` is its type."""
