"""The names of both papers' layers, each a row of the grammar of `jaxmem.mixers.two_mamba`.

The first paper's names are a table, with its unlisted types and, for the two that upstream gets
wrong, the intended form beside it. Those of the second are read by a parser:
`kernel__norm(__addition)*`. `softmax` is a name in both, with other rotary positions; `mamba` is
the one name that is no row, but the layer `jaxmem.mixers.mamba2`.

Reference: the README's attention types and the configurations of 2Mamba2Furious (arXiv 2507.23632,
  arXiv 2602.17363).
"""

from typing import Any, Literal, get_args, overload

from jaxmem.errors import ConfigError, UnknownName, unknown_name
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.two_mamba import TwoMambaConfig

Paper = Literal["attention", "mamba"]
"""The paper of the attention types (2507.23632), or that of the Mamba build-up (2602.17363)."""
Fields = dict[str, Any]

_PLAIN: Fields = {"kernel": "exp", "decay": "none", "denominator": "one", "conv": 0}
"""What a row has where it says nothing: sums of exponentials as they are."""
_GATED: Fields = {"clamp": 5.0, "denominator": "count"}
_LN: Fields = {"norm": "ln", "norm_eps": 1e-5}

ATTENTION: dict[str, Fields] = {
    "softmax": {"denominator": "sum"},
    "softmax_clamp_denom": {"clamp": 5.0, "denominator": "sum", "floor": 1.0},
    "softmax_detach_denom": {"clamp": 5.0, "denominator": "sum", "floor": 1.0, "detach": True},
    "softmax_detach_denom_gate": {
        "clamp": 5.0,
        "denominator": "sum",
        "eps": 1e-4,
        "detach": True,
        "out_gate": "pre",
    },
    "softmax_divs": _GATED,
    "softmax_gate": {"clamp": 5.0, "out_gate": "pre"},
    "softmax_divS_gate": _GATED | {"out_gate": "pre"},
    "softmax_divS_gatev2": _GATED | {"out_gate": "pre"},
    "softmax_divS_norm": _GATED | {"norm": "rms"},
    "softmax_taylor_80terms": {"kernel": "taylor", "terms": 80},
    "gated_softmax": _GATED | _LN | {"key_gate": "sigmoid", "out_gate": "pre"},
    "gated_softmax_no_norm": _GATED | {"key_gate": "sigmoid", "out_gate": "pre"},
    "gated_softmax_no_in_gate": _GATED | _LN | {"out_gate": "pre"},
    "gated_softmax_no_out_gate": _GATED | _LN | {"key_gate": "sigmoid"},
    "gated_softmax_no_out_gate_no_norm": _GATED | {"key_gate": "sigmoid"},
    "gated_softmax_no_in_gate_no_norm": _GATED | {"out_gate": "pre"},
    "gated_relu_no_in_gate_no_norm": _GATED
    | {"feature": "relu", "kernel": "pow1", "out_gate": "pre"},
    "gated_softmax_no_gate": _GATED | _LN,
    "gated_softmax_no_gate_rmsnorm": _GATED | {"norm": "rms"},
    "gated_softmax_no_gate_rmsnorm_nodivS": {"clamp": 5.0, "norm": "rms"},
    "gated_softmax_no_gate_L2norm_nodivS": {"clamp": 5.0, "norm": "l2"},
    "gated_softmax_no_gate_L2norm_nodivS_noclamp": {"norm": "l2"},
    "gated_ReLU_no_gate_L2norm_nodivS_noclamp": {"feature": "relu", "kernel": "pow1", "norm": "l2"},
    "gated_softmax_out_gate_L2norm_nodivS_noclamp": {
        "denominator": "count",
        "out_gate": "pre",
        "norm": "l2",
    },
    "gated_softmax_post_out_gate_L2norm_nodivS_noclamp": {
        "denominator": "count",
        "out_gate": "both",
        "norm": "l2",
    },
    "gated_softmax_no_gate_no_norm": _GATED,
    "linear_elu": {
        "feature": "elu1",
        "scale_products": False,
        "kernel": "pow1",
        "denominator": "sum",
    },
    "linear_relu": {
        "feature": "relu",
        "scale_products": False,
        "kernel": "pow1",
        "denominator": "sum",
        "eps": 1e-8,
    },
    "linear_cosine": {
        "feature": "l2_heads",
        "scale_products": False,
        "kernel": "pow1",
        "key_gate": "count_pow",
    },
}
"""The attention types as upstream has them, without `rope`, which is half in all of them."""

FIXED: dict[str, Fields] = {
    "softmax_taylor_80terms": {"kernel": "taylor", "terms": 80, "denominator": "sum"},
    "linear_cosine": {
        "feature": "l2",
        "scale_products": False,
        "kernel": "pow1",
        "denominator": "count_pow",
    },
}
"""What two of these names mean: upstream divides other weights than it multiplies values with, and
takes lengths over heads and scales values rather than outputs."""

UNLISTED: dict[str, Fields] = {
    "gated_softmax_no_gate_customnorm": _GATED | {"norm": "l2d"},
    "cumulative_gated_softmax": _GATED | {"out_gate": "pre_exp"},
    "gated_softmax_cumgate": {"clamp": 5.0, "denominator": "gate_sum"},
    "gated_softmax_decay": _GATED
    | _LN
    | {"key_gate": "sigmoid", "out_gate": "pre", "decay": "lagged", "rope": "none"},
    "softmax_learned_terms": {"kernel": "series", "terms": 10},
    "poly_learned_coefficients": {"kernel": "head_series", "terms": 4, "norm": "rms"},
}
"""Further types of the same upstream class, and the predecessor with coefficients per head."""

MAMBA = (
    "softmax",
    "linear",
    "linear__output_norm",
    "linear__output_norm__ReLU",
    *(f"linear__output_norm__in_conv_k_{w}{act}" for act in ("", "__silu") for w in (2, 3, 4)),
    "linear__output_norm__D_res",
    "linear__output_norm__Z_out_gate",
    "linear__output_norm__dt_on_values",
    "linear__output_norm__A_mask_type_discretize",
    "linear__output_norm__A_mask_type_neg_softplus",
    "linear__output_norm__A_mask_type_discretize__in_conv_k_2",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2",
    *(
        f"linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values{addition}"
        for addition in ("", "__silu", "__D_res", "__Z_out_gate")
    ),
    "squared__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
    "linear__out_norm__A_mask_type_neg_softplus__in_conv_k_2",
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
)
"""The build-up's names that are rows; the 28th is `MAMBA2`."""

MAMBA2 = "mamba"
"""The build-up's name of the official Mamba-2 block, with one head."""

ALIASES = {
    "mamba2s": "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "2mamba": "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
    "2mamba_e": "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
}
"""The second paper's names of its headline models."""

_KERNELS = {"linear": "pow1", "squared": "pow2", "exp": "exp"}
_NORMS: dict[str, Fields] = {
    "sm_norm": {"denominator": "sum"},
    "output_norm": {"norm": "rms_all"},
    "out_norm": {"norm": "rms_all"},
}
_ADDITIONS: dict[str, tuple[str, Any]] = {
    **{f"A_mask_type_{kind}": ("decay", kind) for kind in ("discretize", "neg_softplus")},
    **{f"in_conv_k_{width}": ("conv", width) for width in (2, 3, 4)},
    "dt_on_values": ("value", "dt"),
    "silu": ("feature", "silu"),
    "ReLU": ("feature", "relu"),
    "D_res": ("skip", True),
    "Z_out_gate": ("out_gate", "z"),
}
"""Part of a name -> the field that it sets, and to what."""
_IRREGULAR: dict[str, Fields] = {
    "softmax": {"rope": "pairs", "denominator": "sum"},
    "linear": {"kernel": "pow1", "denominator": "sum", "feature": "relu"},
}


def fields(name: str, paper: Paper = "mamba", *, fixed: bool = False) -> Fields:
    """Return the fields of a published name, which differ from those of plain sums of exp.

    Args:
      name: as upstream writes it, or a name of `ALIASES`.
      paper: whose names these are; `softmax` is in both.
      fixed: for `softmax_taylor_80terms` and `linear_cosine`, what was intended.

    Raises:
      UnknownName: there is no such paper, it has no such name, no fixed form of it, or the name is
        that of Mamba-2, which has other fields.
      ConfigError: two parts of the name set the same field.
    """
    if paper not in get_args(Paper):
        raise unknown_name("paper", paper, get_args(Paper))
    if fixed and (paper != "attention" or name not in FIXED):
        raise UnknownName(
            f"There is no fixed form of {name!r} in the paper {paper!r}. Leave `fixed` out; only "
            f"{' and '.join(sorted(FIXED))} of the paper 'attention' have one."
        )
    if paper == "mamba":
        return _PLAIN | _parsed(ALIASES.get(name, name))
    table = FIXED if fixed else ATTENTION | UNLISTED
    if name not in table:
        raise unknown_name("attention type", name, table)
    return _PLAIN | {"rope": "half"} | table[name]


# A name that is no literal is taken for a row, as all names but this one are.
@overload
def from_name(  # pyright: ignore[reportOverlappingOverload]
    name: Literal["mamba"], paper: Literal["mamba"] = "mamba", **more: Any
) -> Mamba2Config: ...
@overload
def from_name(
    name: str, paper: Paper = "mamba", *, fixed: bool = False, **more: Any
) -> TwoMambaConfig: ...
def from_name(
    name: str, paper: Paper = "mamba", *, fixed: bool = False, **more: Any
) -> TwoMambaConfig | Mamba2Config:
    """Return the config of a published name, with further fields.

    Args:
      name: as upstream writes it, or a name of `ALIASES`.
      paper: whose names these are; `softmax` is in both.
      fixed: for `softmax_taylor_80terms` and `linear_cosine`, what was intended.
      **more: fields such as `num_heads`. Those of `mamba` are `head_dim`, the width of its one
        head, and the other fields of `Mamba2Config`; `ssm_dim=None` makes as many heads as fit.

    Raises:
      UnknownName: there is no such paper, it has no such name, or no fixed form of it.
      ConfigError: two parts of the name set the same field, or `num_heads` is given for `mamba`.
    """
    if (name, paper, fixed) == (MAMBA2, "mamba", False):
        return _one_head(**more)
    return TwoMambaConfig(**fields(name, paper, fixed=fixed) | more)


def _one_head(*, head_dim: int = Mamba2Config.head_dim, **more: Any) -> Mamba2Config:
    """Return Mamba-2 as upstream trained it: one head of a head's width, the rest a gated MLP."""
    if "num_heads" in more:
        raise ConfigError(
            f"{MAMBA2!r} is Mamba-2 with one head, found num_heads={more['num_heads']}. Give its "
            "width, the model's over the heads of the other layers: "
            f"from_name({MAMBA2!r}, head_dim=64)."
        )
    heads: Fields = {"head_dim": head_dim, "ssm_dim": head_dim}
    return Mamba2Config(**heads | more)


def _parsed(name: str) -> Fields:
    """Return what the parts of a name of the build-up say."""
    if name == MAMBA2:
        raise UnknownName(
            f"{name!r} is Mamba-2, whose fields are others. Use from_name({name!r}, head_dim=64)."
        )
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    parts = name.split("__")
    first = len(parts) > 1 and parts[0] in _KERNELS and parts[1] in _NORMS
    if not first or not set(parts[2:]) <= _ADDITIONS.keys():
        raise unknown_name("build-up type", name, [*MAMBA, MAMBA2, *ALIASES])
    kernel, norm, *additions = parts
    row: Fields = {"kernel": _KERNELS[kernel], **_NORMS[norm]}
    for addition in additions:
        field, value = _ADDITIONS[addition]
        if field in row:
            same = [part for part in additions if _ADDITIONS[part][0] == field]
            raise ConfigError(f"{name!r} sets {field} by {' and '.join(same)}. Keep one of them.")
        row[field] = value
    return row
