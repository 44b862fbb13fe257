"""Names of the Memory Mosaics releases: nanoMosaics, the Library's two variants, and their GPT.

Both releases name the parameters of their GPT alike.

Reference: nanoMosaics `MemoryMosaic`, `GPT`; Library `StackAssoMem`, `GPT` (arXiv 2405.06394).
"""

from jaxmem.interop.names import (
    BANKS,
    CONV,
    LEADING,
    PER_HEAD,
    Names,
    Origin,
    layer_norm,
    linear,
)
from jaxmem.nn.features import Extractor

MOSAIC_KEY = linear("W_k", "projection") | Names(
    {
        "decay": Origin("leaky_avg.leaky_key_beta", PER_HEAD),
        "scale": Origin("key_scale", PER_HEAD),
    },
    constants=(r"leaky_avg\.coef",),
)
"""nanoMosaics `KeyFeatExtractor`; `coef` is the table of negative distances."""

MOSAIC_VALUE = linear("W_v", "projection") | Names(
    {"mix": Origin("coef", PER_HEAD), "scale": Origin("val_scale", PER_HEAD)}
)
"""nanoMosaics `ValFeatExtractor`."""

MOSAIC_CONTEXTUAL = (
    MOSAIC_KEY.under("k_featurizer", "key")
    | MOSAIC_VALUE.under("v_featurizer", "value")
    | linear("c_proj", "out")
    | Names(constants=("bias",))
)
"""nanoMosaics `ContextMem`; `bias` is the causal mask."""

MOSAIC_PERSISTENT = (
    Names(
        {
            "keys": Origin("P_k", BANKS),
            "values": Origin("P_v", BANKS),
            "scale": Origin("out_scale", PER_HEAD),
        }
    )
    | MOSAIC_KEY.under("k_featurizer", "key")
    | linear("c_proj", "out")
)
"""nanoMosaics `PersistentMem`."""

_NORMS = layer_norm("ln_1", "norm_1") | layer_norm("ln_2", "norm_2")

MOSAIC_BLOCK = (
    _NORMS
    | MOSAIC_CONTEXTUAL.under("attn", "mixer")
    | MOSAIC_PERSISTENT.under("mlp", "feed_forward")
)
"""nanoMosaics `Block`."""

MOSAIC = (
    Names({"embedding.table": Origin("mosaic.wte.weight")}, {"lm_head.weight": "mosaic.wte.weight"})
    | MOSAIC_BLOCK.under("mosaic.h.{n}", "blocks.{n}")
    | layer_norm("mosaic.ln_f", "norm")
)
"""nanoMosaics `MemoryMosaic`, the whole model."""

GPT_ATTENTION = linear("c_attn", "qkv") | linear("c_proj", "out") | Names(constants=("bias",))
"""`CausalSelfAttention`; `bias` is the causal mask."""

GPT_MLP = linear("c_fc", "up") | linear("c_proj", "down")

GPT_BLOCK = _NORMS | GPT_ATTENTION.under("attn", "mixer") | GPT_MLP.under("mlp", "feed_forward")

GPT = (
    Names(
        {
            "embedding.table": Origin("transformer.wte.weight"),
            "position.table": Origin("transformer.wpe.weight"),
        },
        {"lm_head.weight": "transformer.wte.weight"},
    )
    | GPT_BLOCK.under("transformer.h.{n}", "blocks.{n}")
    | layer_norm("transformer.ln_f", "norm")
)
"""nanoGPT's and Library's `GPT`, the whole model."""


def library_extractor(kind: Extractor) -> Names:
    """Return the names of the Library's `FeatureExtractor`."""
    if kind == "mix":
        return linear("linear", "projection") | Names({"mix": Origin("coef")})
    return linear("conv", "projection", layout=CONV)


def _library_key(kind: Extractor, eft: bool) -> Names:
    if not eft:
        decay = Names({"key.decay": Origin("leaky_key_beta")})
        keys = library_extractor(kind).under("k_featurizer", "key")
    else:
        first, second = (f"leaky_average.leaky_beta_{part}_under" for part in "wu")
        decay = Names({"key.decay": Origin(first)}, {second: first})
        keys = linear("leaky_average.linear", "key.projection")
    return keys | decay | Names({"key.scale": Origin("kernel_beta")})


def library_contextual(key: Extractor, value: Extractor, *, eft: bool = False) -> Names:
    """Return the names of the Library's `InContextAssoMemBlock`.

    Args:
      key: kind of its key extractor.
      value: kind of its value extractor.
      eft: whether it is the variant with the efficient operator, whose keys have other names.
    """
    return (
        _library_key(key, eft)
        | library_extractor(value).under("v_featurizer", "value")
        | Names({"value.scale": Origin("value_beta")})
        | linear("c_proj", "out")
    )


LIBRARY_TABLES = Names(
    {"keys": Origin("M_k{i}", LEADING), "values": Origin("M_v{i}", LEADING)},
)
"""The Library's `Pmem`."""


def library_persistent(key: Extractor, *, eft: bool = False) -> Names:
    """Return the names of the Library's `PersistentAssoMemBlock`; arguments as of the other."""
    return (
        _library_key(key, eft)
        | LIBRARY_TABLES.under("pmem")
        | Names({"scale": Origin("value_beta")})
        | linear("c_proj", "out")
    )


def library_block(contextual: Names, persistent: Names) -> Names:
    """Return the names of the Library's `AttnOnlyBlock` with these memories."""
    return (
        layer_norm("ln1", "norm_1")
        | contextual.under("attn", "mixer")
        | layer_norm("ln2", "norm_2")
        | persistent.under("pmem", "feed_forward")
    )


def library_model(block: Names) -> Names:
    """Return the names of the Library's `StackAssoMem` with these blocks."""
    return (
        Names(
            {"embedding.table": Origin("emb.weight"), "head.table": Origin("head.weight")},
            {"head.weight": "emb.weight"},
        )
        | block.under("blocks.{n}", "blocks.{n}")
        | layer_norm("ln_out", "norm")
    )
