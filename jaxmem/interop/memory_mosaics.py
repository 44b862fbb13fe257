"""Names of the Memory Mosaics release: nanoMosaics' mosaic, and the GPT of nanoMosaics and Library.

Both releases name the parameters of their GPT alike.

Reference: nanoMosaics `MemoryMosaic`, `GPT`; Library `GPT` (arXiv 2405.06394).
"""

from jaxmem.interop.names import BANKS, PER_HEAD, Names, Origin, layer_norm, linear

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
