"""Both papers' tables at a scale for a CPU: the build-up, its parts, kernels, gates and norms.

Source: 2Mamba2Furious (arXiv 2602.17363), tables 1 to 3 and figure 7, test losses of the small
model at 2048 tokens; softmax as a recurrent network (arXiv 2507.23632), without published numbers.
Characters of Shakespeare's plays (the default corpus) instead of FineWeb: text too local to tell
second from first order.
Time: 14 min on 2 CPU cores with --jobs 2, 114 runs of half a preset each
"""

import dataclasses

from configs._two_mamba_text import TINY
from jaxmem.interop.attention_types import Paper, from_name
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.reports.sweep_suite import Cell, Suite

SHORT = "--run.steps 200 --model.context-len 64 --run.eval-every 200 --run.samples 0"
"""Half of the presets' updates and tokens per row, for every cell alike."""
BASE = from_name("2mamba", num_heads=TINY.num_heads)

BUILD_UP: dict[str, tuple[str, float | None]] = {
    "plain": ("linear__output_norm", 3.13),
    "relu": ("linear__output_norm__ReLU", 3.06),
    "row_norm+relu": ("linear", 3.03),
    "conv2": ("linear__output_norm__in_conv_k_2", 2.93),
    "conv3": ("linear__output_norm__in_conv_k_3", 2.91),
    "conv4": ("linear__output_norm__in_conv_k_4", 2.90),
    "conv2+silu": ("linear__output_norm__in_conv_k_2__silu", 2.90),
    "D": ("linear__output_norm__D_res", 3.11),
    "Z": ("linear__output_norm__Z_out_gate", 3.13),
    "dt": ("linear__output_norm__dt_on_values", 3.06),
    "A_original": ("linear__output_norm__A_mask_type_discretize", 2.98),
    "A_softplus": ("linear__output_norm__A_mask_type_neg_softplus", 2.88),
    "conv2+A_original": ("linear__output_norm__A_mask_type_discretize__in_conv_k_2", 2.80),
    "conv2+A_softplus": ("linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2", 2.77),
    "mamba2s": ("mamba2s", 2.76),
    "mamba2s+silu": (
        "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__silu",
        2.76,
    ),
    "mamba2s+D": (
        "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__D_res",
        2.76,
    ),
    "mamba2s+Z": (
        "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__Z_out_gate",
        2.78,
    ),
    "2mamba+dt": (
        "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
        2.73,
    ),
    "2mamba": ("2mamba", None),
    "2mamba_e": ("2mamba_e", None),
    "softmax": ("softmax", 2.73),
}
"""Label -> build-up type and its published test loss in nats per token."""
ATTENTION = {
    "softmax_half_rope": "softmax",
    "clamp+sum": "softmax_clamp_denom",
    "detached_sum": "softmax_detach_denom",
    "count_only": "softmax_divs",
    "undivided+gate": "softmax_gate",
    "count+out_gate": "gated_softmax_no_in_gate_no_norm",
    "count+in_gate": "gated_softmax_no_out_gate_no_norm",
    "count+gates": "gated_softmax_no_norm",
    "count+gates+ln": "gated_softmax",
    "exp+ln": "gated_softmax_no_gate",
    "exp+rms": "softmax_divS_norm",
    "exp+l2": "gated_softmax_no_gate_L2norm_nodivS_noclamp",
    "linear_elu": "linear_elu",
    "linear_relu": "linear_relu",
    "linear_cosine": "linear_cosine",
}
"""Label -> attention type of the other paper."""
NORMS = ("exp+rms", "exp+l2")
CLAIMS = (
    *((norm, gated) for norm in NORMS for gated in ("count_only", "count+out_gate", "count+gates")),
    *(
        (exp, linear)
        for exp in ("softmax_half_rope", *NORMS)
        for linear in ("linear_elu", "linear_relu", "linear_cosine")
    ),
)
"""What that paper finds: a norm may take the place of the sum, gates may not; linear is worst."""


def flags(config: TwoMambaConfig) -> str:
    """Return the flags that turn the preset's mixer into this one."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(BASE, field.name):
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--model.mixer.{'' if value else 'no-'}{name}")
        else:
            words.append(f"--model.mixer.{name} {value}")
    return " ".join(words)


def cell(label: str, name: str, paper: Paper, published: float | None) -> Cell:
    """Return the cell of a published name."""
    config = from_name(name, paper, num_heads=TINY.num_heads)
    overrides = f"{SHORT} {flags(config)}"
    preset = "two_mamba_2mamba_tiny"
    return Cell(label=label, preset=preset, overrides=overrides, published=published)


suite = Suite(
    cells=(
        *(cell(label, name, "mamba", loss) for label, (name, loss) in BUILD_UP.items()),
        Cell(
            label="mamba2_one_head",
            preset="two_mamba_mamba2_tiny",
            overrides=f"{SHORT} --model.mixer.ssm-dim {TINY.head_dim}",
            published=2.88,
        ),
        *(cell(label, name, "attention", None) for label, name in ATTENTION.items()),
    ),
    seeds=(0, 1, 2),
    claims=CLAIMS,
)
