"""Families of original checkpoints: their names, and which of our models compute what they do."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.interop import memory_mosaics as mosaics
from jaxmem.interop import two_mamba
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


class Family(NamedTuple):
    """Checkpoints that share their names and the function of their models."""

    title: str
    mark: str
    """Regular expression of a name that occurs in checkpoints of this family alone."""
    names: Callable[[DecoderConfig], Names]
    """From a model's config, which `requires` allows, to its original names."""
    requires: Mapping[str, tuple[Any, ...]]
    """Dotted field of the config -> values, or classes of values, with which a model computes what
    the original does. Sizes and biases are left to the shapes and names of the tensors."""

    def differences(self, config: Any) -> list[str]:
        """Say what keeps a model of this config from being of the family."""
        if not isinstance(config, DecoderConfig):
            return [f"it is a {type(config).__name__} instead of a DecoderConfig"]
        found = []
        for path, allowed in self.requires.items():
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
    "mixer.rope": ("none", "pairs"),
    "mixer.kernel": ("exp", "pow1", "pow2"),
    "mixer.denominator": ("one", "count", "sum"),
    "mixer.key_gate": ("none",),
    "mixer.out_gate": ("none", "z"),
    "mixer.norm": ("none", "rms_all"),
}
_ATTENTION = _LLAMA | {
    "mixer": (TwoMambaConfig,),
    "mixer.rope": ("none", "half"),
    "mixer.kernel": ("exp", "pow1", "taylor", "series"),
    "mixer.decay": ("none", "lagged"),
    "mixer.conv": (0,),
    "mixer.value": ("none",),
    "mixer.skip": (False,),
    "mixer.out_gate": ("none", "pre", "post", "both", "pre_exp"),
    "mixer.norm": ("none", "ln", "rms", "l2", "l2d"),
}
_MAMBA2 = _LLAMA | {"mixer": (Mamba2Config,)}


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
    ),
    "two_mamba_attention": Family(
        "2Mamba's models of the attention types",
        rf"{_LAYER}\.self_attn\.q_proj\.weight",
        lambda _: two_mamba.model(two_mamba.ATTENTION),
        _ATTENTION,
    ),
    "two_mamba_mamba2": Family(
        "2Mamba's models of Mamba-2",
        rf"{_LAYER}\.self_attn\.in_proj\.weight",
        lambda _: two_mamba.model(two_mamba.MAMBA2),
        _MAMBA2,
    ),
}
"""All families by name. The two GELUs of the GPTs cannot be told apart by names: see to it that
`model.feed_forward.activation` is that of the checkpoint."""
