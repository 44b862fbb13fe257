"""Names of 2Mamba2Furious: both papers' layers, the official Mamba-2 block, and the Llama model.

Reference: 2Mamba2Furious `LlamaAttention` of both layer files, in Hugging Face's Llama 2
  (arXiv 2507.23632, arXiv 2602.17363).
"""

from jaxmem.interop.names import PER_HEAD, Layout, Names, Origin, layer_norm, linear

DEPTHWISE = Layout(lambda a: a[:, 0].T, lambda a: a.T[:, None])
"""(channels, 1, W) of a convolution per channel, (W, channels) here."""
LAST = Layout(lambda a: a[0, 0], lambda a: a[None, None])
"""(1, 1, H) of the original, (H,) here."""
ORDERS = Layout(lambda a: a[:, :, 0, 0], lambda a: a[:, :, None, None])
"""(N, H, 1, 1) of the original, (N, H) here."""

_COMMON = linear("o_proj", "out") | layer_norm("out_norm", "norm")

ATTENTION = (
    linear("{q|k|v}_proj", "qkv")
    | linear("in_gate_proj", "key_gate")
    | linear("out_gate_proj", "out_gate")
    | linear("decay_gate_proj", "decay.projection")
    | Names(
        {
            "exponent": Origin("norm_const", PER_HEAD),
            "coefficients": Origin("term_weights"),
        }
    )
    | _COMMON
)
"""The attention types of the first paper, whose projections are apart."""

MAMBA = (
    linear("qkv_proj", "qkv")
    | linear("conv1d", "short_conv", layout=DEPTHWISE)
    | linear("dt_proj", "dt")
    | linear("A_mask_proj", "decay.projection")
    | linear("z_gate_proj", "z")
    | Names(
        {
            "dt_bias": Origin("dt_bias_value", LAST),
            "decay.log_rate": Origin("A_log"),
            "skip": Origin("D"),
        },
        constants=(r"rotary_emb\.freqs", "attn_mask"),
    )
    | _COMMON
)
"""The build-up of the second paper, with one projection."""

MAMBA2 = (
    linear("in_proj", "input")
    | linear("conv1d", "short_conv", layout=DEPTHWISE)
    | linear("out_proj", "out")
    | Names(
        {
            "dt_bias": Origin("dt_bias"),
            "log_rate": Origin("A_log"),
            "skip": Origin("D"),
            "norm.weight": Origin("norm.weight"),
        }
    )
)
"""The official Mamba-2 block."""

POLYNOMIAL = (
    linear("qkv_proj", "qkv")
    | Names({"coefficients": Origin("order_coefficients", ORDERS)})
    | _COMMON
)
"""The predecessor with a learnt coefficient per order and head."""

ROOT_ORDERS = (
    linear("qkv_proj", "qkv")
    | linear("o_proj", "out")
    | Names(
        {
            "of_queries.{n}.kernel": Origin("A_projs.{n}"),
            "of_keys.{n}.kernel": Origin("B_projs.{n}"),
            "norm.weight": Origin("norm.weight"),
        }
    )
)
"""The predecessor with fewer channels for higher orders."""

FEED_FORWARD = linear("gate_proj", "gate") | linear("up_proj", "up") | linear("down_proj", "down")
"""Llama's gated feed-forward layer."""


def block(attention: Names) -> Names:
    """Return the names of a Llama layer with this attention."""
    return (
        attention.under("self_attn", "mixer")
        | FEED_FORWARD.under("mlp", "feed_forward")
        | layer_norm("input_layernorm", "norm_1")
        | layer_norm("post_attention_layernorm", "norm_2")
    )


def model(attention: Names) -> Names:
    """Return the names of the whole Llama model with this attention."""
    return (
        Names(
            {
                "embedding.table": Origin("model.embed_tokens.weight"),
                "head.table": Origin("lm_head.weight"),
            },
            {"lm_head.weight": "model.embed_tokens.weight"},
        )
        | block(attention).under("model.layers.{n}", "blocks.{n}")
        | layer_norm("model.norm", "norm")
    )
