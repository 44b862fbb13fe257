"""Published names: every row of both papers written out, and names that are none."""

import dataclasses

import jaxtyping
import pytest

from jaxmem.errors import ConfigError, UnknownName
from jaxmem.interop.attention_types import (
    ALIASES,
    ATTENTION,
    FIXED,
    MAMBA,
    MAMBA2,
    UNLISTED,
    fields,
    from_name,
)
from jaxmem.mixers.mamba2 import Mamba2Config

EPS32 = 1.1920928955078125e-07
DEFAULTS = {
    "feature": "id",
    "rope": "none",
    "rope_theta": 10000.0,
    "rope_positions": "float32",
    "scale_products": True,
    "clamp": None,
    "kernel": "exp",
    "terms": 10,
    "decay": "none",
    "denominator": "one",
    "floor": 0.0,
    "eps": 0.0,
    "detach": False,
    "conv": 0,
    "value": "none",
    "dt_bias": False,
    "key_gate": "none",
    "skip": False,
    "out_gate": "none",
    "norm": "none",
    "norm_eps": EPS32,
}
"""What a layer does where its row says nothing."""
COUNT = {"clamp": 5.0, "denominator": "count"}
LN = {"norm": "ln", "norm_eps": 1e-5}
UNSCALED = {"scale_products": False, "kernel": "pow1"}

ATTENTION_ROWS = {
    "softmax": {"denominator": "sum"},
    "softmax_clamp_denom": {"clamp": 5.0, "denominator": "sum", "floor": 1.0},
    "softmax_detach_denom": {"clamp": 5.0, "denominator": "sum", "floor": 1.0, "detach": True},
    "softmax_detach_denom_gate": {
        "clamp": 5.0,
        "denominator": "sum",
        "eps": 0.0001,
        "detach": True,
        "out_gate": "pre",
    },
    "softmax_divs": {**COUNT},
    "softmax_gate": {"clamp": 5.0, "out_gate": "pre"},
    "softmax_divS_gate": {**COUNT, "out_gate": "pre"},
    "softmax_divS_gatev2": {**COUNT, "out_gate": "pre"},
    "softmax_divS_norm": {**COUNT, "norm": "rms"},
    "softmax_taylor_80terms": {"kernel": "taylor", "terms": 80},
    "gated_softmax": {**COUNT, "key_gate": "sigmoid", "out_gate": "pre", **LN},
    "gated_softmax_no_norm": {**COUNT, "key_gate": "sigmoid", "out_gate": "pre"},
    "gated_softmax_no_in_gate": {**COUNT, "out_gate": "pre", **LN},
    "gated_softmax_no_out_gate": {**COUNT, "key_gate": "sigmoid", **LN},
    "gated_softmax_no_out_gate_no_norm": {**COUNT, "key_gate": "sigmoid"},
    "gated_softmax_no_in_gate_no_norm": {**COUNT, "out_gate": "pre"},
    "gated_relu_no_in_gate_no_norm": {
        **COUNT,
        "feature": "relu",
        "kernel": "pow1",
        "out_gate": "pre",
    },
    "gated_softmax_no_gate": {**COUNT, **LN},
    "gated_softmax_no_gate_rmsnorm": {**COUNT, "norm": "rms"},
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
    "gated_softmax_no_gate_no_norm": {**COUNT},
    "linear_elu": {**UNSCALED, "feature": "elu1", "denominator": "sum"},
    "linear_relu": {**UNSCALED, "feature": "relu", "denominator": "sum", "eps": 1e-8},
    "linear_cosine": {**UNSCALED, "feature": "l2_heads", "key_gate": "count_pow"},
}
FIXED_ROWS = {
    "linear_cosine": {**UNSCALED, "feature": "l2", "denominator": "count_pow"},
    "softmax_taylor_80terms": {"kernel": "taylor", "terms": 80, "denominator": "sum"},
}
UNLISTED_ROWS = {
    "gated_softmax_no_gate_customnorm": {**COUNT, "norm": "l2d"},
    "cumulative_gated_softmax": {**COUNT, "out_gate": "pre_exp"},
    "gated_softmax_cumgate": {"clamp": 5.0, "denominator": "gate_sum"},
    "gated_softmax_decay": {
        **COUNT,
        **LN,
        "rope": "none",
        "decay": "lagged",
        "key_gate": "sigmoid",
        "out_gate": "pre",
    },
    "softmax_learned_terms": {"kernel": "series"},
    "poly_learned_coefficients": {"kernel": "head_series", "terms": 4, "norm": "rms"},
}

OUT = {"kernel": "pow1", "norm": "rms_all"}
SOFTPLUS = {"decay": "neg_softplus"}
CONV_SOFTPLUS = {"decay": "neg_softplus", "conv": 2}
MAMBA2S = {**OUT, **CONV_SOFTPLUS, "value": "dt"}
LONG = "A_mask_type_neg_softplus__in_conv_k_2"
MAMBA_ROWS = {
    "softmax": {"rope": "pairs", "denominator": "sum"},
    "linear": {"feature": "relu", "kernel": "pow1", "denominator": "sum"},
    "linear__output_norm": OUT,
    "linear__output_norm__A_mask_type_discretize": {**OUT, "decay": "discretize"},
    "linear__output_norm__A_mask_type_neg_softplus": {**OUT, **SOFTPLUS},
    "linear__output_norm__D_res": {**OUT, "skip": True},
    "linear__output_norm__ReLU": {**OUT, "feature": "relu"},
    "linear__output_norm__Z_out_gate": {**OUT, "out_gate": "z"},
    "linear__output_norm__dt_on_values": {**OUT, "value": "dt"},
    "linear__output_norm__in_conv_k_2": {**OUT, "conv": 2},
    "linear__output_norm__in_conv_k_3": {**OUT, "conv": 3},
    "linear__output_norm__in_conv_k_4": {**OUT, "conv": 4},
    f"linear__out_norm__{LONG}": {**OUT, **CONV_SOFTPLUS},
    "linear__output_norm__A_mask_type_discretize__in_conv_k_2": {
        **OUT,
        "decay": "discretize",
        "conv": 2,
    },
    f"linear__output_norm__{LONG}": {**OUT, **CONV_SOFTPLUS},
    "linear__output_norm__in_conv_k_2__silu": {**OUT, "feature": "silu", "conv": 2},
    "linear__output_norm__in_conv_k_3__silu": {**OUT, "feature": "silu", "conv": 3},
    "linear__output_norm__in_conv_k_4__silu": {**OUT, "feature": "silu", "conv": 4},
    f"linear__output_norm__{LONG}__dt_on_values": MAMBA2S,
    f"linear__output_norm__{LONG}__dt_on_values__D_res": {**MAMBA2S, "skip": True},
    f"linear__output_norm__{LONG}__dt_on_values__Z_out_gate": {**MAMBA2S, "out_gate": "z"},
    f"linear__output_norm__{LONG}__dt_on_values__silu": {**MAMBA2S, "feature": "silu"},
    f"squared__sm_norm__{LONG}": {**CONV_SOFTPLUS, "kernel": "pow2", "denominator": "sum"},
    f"squared__output_norm__{LONG}__dt_on_values": {**MAMBA2S, "kernel": "pow2"},
    f"squared__sm_norm__{LONG}__dt_on_values": {
        **CONV_SOFTPLUS,
        "kernel": "pow2",
        "denominator": "sum",
        "value": "dt",
    },
    f"exp__sm_norm__{LONG}": {**CONV_SOFTPLUS, "denominator": "sum"},
    f"exp__sm_norm__{LONG}__dt_on_values": {
        **CONV_SOFTPLUS,
        "denominator": "sum",
        "value": "dt",
    },
}


HALF = {"rope": "half"}
ROWS = {
    **{(n, "attention", False): HALF | r for n, r in (ATTENTION_ROWS | UNLISTED_ROWS).items()},
    **{(name, "attention", True): HALF | row for name, row in FIXED_ROWS.items()},
    **{(name, "mamba", False): row for name, row in MAMBA_ROWS.items()},
}
"""By name, paper and whether it is a fixed form."""


def test_every_published_name_is_written_out():
    assert ATTENTION.keys() == ATTENTION_ROWS.keys()
    assert FIXED.keys() == FIXED_ROWS.keys()
    assert UNLISTED.keys() == UNLISTED_ROWS.keys()
    assert set(MAMBA) == MAMBA_ROWS.keys()
    assert len(ATTENTION) == 29
    assert len({*MAMBA, MAMBA2}) == len(MAMBA) + 1 == 28


@pytest.mark.parametrize(("name", "paper", "fixed"), [*ROWS])
def test_a_name_is_its_row(name, paper, fixed):
    config = from_name(name, paper, fixed=fixed, num_heads=3)
    found = dataclasses.asdict(config)
    common = {"form": "parallel", "chunk_size": 64, "implementation": "auto", "num_heads": 3}
    assert found == common | DEFAULTS | ROWS[name, paper, fixed]


def test_headline_models_have_names_of_their_own():
    full = {
        "mamba2s": f"linear__output_norm__{LONG}__dt_on_values",
        "2mamba": f"squared__sm_norm__{LONG}",
        "2mamba_e": f"exp__sm_norm__{LONG}",
    }
    assert full == ALIASES
    for alias, name in full.items():
        assert from_name(alias, num_heads=2) == from_name(name, num_heads=2)


def test_mamba_is_mamba_2_with_one_head():
    one = Mamba2Config(head_dim=64, ssm_dim=64, state_dim=128, conv=2, norm_eps=1e-5)
    assert from_name("mamba") == one
    small = from_name("mamba", head_dim=16, state_dim=32)
    assert small == dataclasses.replace(one, head_dim=16, ssm_dim=16, state_dim=32)
    full = from_name("mamba", head_dim=16, ssm_dim=None)
    assert full == dataclasses.replace(one, head_dim=16, ssm_dim=None)
    with pytest.raises(ConfigError, match=r"found num_heads=4.*from_name\('mamba', head_dim=64\)"):
        from_name("mamba", num_heads=4)
    with pytest.raises(UnknownName, match=r"'mamba' is Mamba-2.*from_name\('mamba', head_dim"):
        fields("mamba")
    with pytest.raises(UnknownName, match="Unknown attention type 'mamba'"):
        from_name("mamba", "attention")


def test_a_combination_that_is_not_published_is_read():
    row = {"kernel": "pow2", "denominator": "sum", "feature": "relu", "conv": 4, "skip": True}
    assert fields("squared__sm_norm__D_res__in_conv_k_4__ReLU").items() >= row.items()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear__output_norm__silu__ReLU", "sets feature by silu and ReLU. Keep one of them"),
        ("linear__output_norm__silu__silu", "sets feature by silu and silu"),
        (
            "linear__output_norm__in_conv_k_2__D_res__in_conv_k_3",
            "sets conv by in_conv_k_2 and in_conv_k_3",
        ),
    ],
)
def test_parts_of_a_name_that_contradict_each_other(name, words):
    with pytest.raises(ConfigError, match=words):
        fields(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exp", "exp__sm_norm"),
        ("linear__", "linear__output_norm"),
        ("linear__sm_norm__", "linear"),
        ("cubed__sm_norm", "Unknown build-up type 'cubed__sm_norm'"),
        ("squared__sm_norm__A_mask_type_neg_softplu", "squared__sm_norm__A_mask_type_neg_softplus"),
        ("mamb", "Did you mean mamba"),
    ],
)
def test_names_that_the_build_up_does_not_have(name, words):
    with pytest.raises(UnknownName, match=words):
        fields(name)


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("softmax", "mamba"),
        ("linear_cosine", "mamba"),
        ("mamba", "mamba"),
        ("2mamba", "mamba"),
        ("softmax_divs", "attention"),
    ],
)
def test_forms_that_need_no_fixing(name, paper):
    words = f"no fixed form of '{name}' in the paper '{paper}'.*linear_cosine and softmax_taylor"
    with pytest.raises(UnknownName, match=words):
        from_name(name, paper, fixed=True)


def test_papers_that_there_are_not(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without the tests' hook
    for name in ("softmax", "mamba", "2mamba"):
        with pytest.raises(UnknownName, match=r"Unknown paper 'mambo'. Did you mean mamba\?"):
            from_name(name, "mambo")
