"""Golden files of 2Mamba2Furious: layers of both papers, blocks, models and decoding."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.backbones.block import Block
from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.interop import two_mamba as names
from jaxmem.interop.attention_types import ATTENTION, MAMBA, UNLISTED, from_name
from jaxmem.interop.names import Names, to_original
from jaxmem.mixers.base import Mixer, MixerConfig, build
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.root_orders import RootOrdersConfig
from jaxmem.mixers.softmax_state import SoftmaxStateConfig
from jaxmem.mixers.swiglu import SwiGLUConfig
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.nn.init import uniform_init
from tests.golden.adapters import Arrays, Golden, Mismatch, Unsupported
from tests.golden.adapters.common import Loaded, Values, keyed, load_module, module_results

SYSTEM = "two_mamba"
LLAMA = {"norm_type": "rms", "norm_eps": 1e-5, "use_bias": False}

_SWITCHES = {
    "power": ("kernel", {"1": "pow1", "2": "pow2", "exp": "exp"}),
    "qk_activation_type": ("feature", {"none": "id", "relu": "relu", "silu": "silu"}),
    "use_NoPE": ("rope", {True: "none", False: "pairs"}),
    "use_D_res": ("skip", {True: True, False: False}),
    "use_z_out_gate": ("out_gate", {True: "z", False: "none"}),
    "use_dt_bias": ("dt_bias", {True: True, False: False}),
}
"""Upstream's switch -> our field, and its values in ours."""


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file has a type of attention, as those of this set do."""
    return "attention_type" in meta


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file."""
    config, table = layer(golden)
    group = golden.meta["group"]
    if "language model" in group:
        return _model(golden, config, table, dtype)
    if "decoder layer" in group:
        return _layer(golden, config, table, dtype)
    if "decode" in group:
        return _decode(golden, config, table, dtype)
    return _attention(golden, config, table, dtype)


def layer(golden: Golden) -> tuple[MixerConfig, Names]:
    """Return the layer of a file, and its names there.

    Raises:
      Mismatch: the file has other switches, or sizes, than its published name has here.
    """
    meta = golden.meta
    name, heads = meta["attention_type"], {"num_heads": meta["heads"]}
    separate = any(key.endswith("q_proj.weight") for key in golden.group("param"))
    special = {"softmax_seq": "state", "softmax_seq2": "output"}
    if name == "mamba":
        return _mamba2(meta), names.MAMBA2
    if name in special:
        return SoftmaxStateConfig(of=special[name], **heads), names.ATTENTION
    if name.startswith("poly_order"):
        count = sum("A_projs" in key for key in golden.group("param"))
        return RootOrdersConfig(orders=count, **heads), names.ROOT_ORDERS
    if name == "poly_learned_coefficients":
        terms = golden.arrays["param/order_coefficients"].shape[0]
        return from_name(name, "attention", terms=terms, **heads), names.POLYNOMIAL
    if separate and name in ATTENTION | UNLISTED:
        fixed = "intended form" in meta["group"]
        more = {"terms": len(golden.arrays["param/term_weights"])} if "learned" in name else {}
        return from_name(name, "attention", fixed=fixed, **heads, **more), names.ATTENTION
    return _build_up(name, meta.get("config", {}), heads), names.MAMBA


def _build_up(name: str, switches: Mapping[str, Any], heads: Mapping[str, Any]) -> TwoMambaConfig:
    """Return the layer of a published name, or of the file's switches where it has no such name."""
    switched = TwoMambaConfig(**_fields(switches), **heads) if "power" in switches else None
    if name in MAMBA:
        named = from_name(name, "mamba", **heads)
        return named if switched is None else _equal(name, named, switched)
    if switched is None:
        raise Unsupported(f"{name!r} is not published and has no switches")
    return switched


def _mamba2(meta: Mapping[str, Any]) -> Mamba2Config:
    if meta.get("ngroups", 1) != 1 or meta.get("conv_bias"):
        raise Unsupported("Mamba-2 with several groups or a bias in its convolution")
    sizes = {"head_dim": meta["head_dim"], "state_dim": meta["d_state"], "conv": meta["d_conv"]}
    sizes["norm_eps"] = meta["norm_eps"]
    stated = Mamba2Config(ssm_dim=meta["d_ssm"], **sizes)
    published = "exactly as configured" in meta["group"]
    return _equal("mamba", from_name("mamba", **sizes), stated) if published else stated


Config = TypeVar("Config", bound=MixerConfig)


def _equal(name: str, named: Config, stated: Config) -> Config:
    """Return the layer of a name if it is also what the file says.

    Raises:
      Mismatch: it is not.
    """
    pairs = {
        field.name: (getattr(named, field.name), getattr(stated, field.name))
        for field in dataclasses.fields(named)
    }
    wrong = [
        f"{field}={ours!r}, not {theirs!r}"
        for field, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise Mismatch(f"{name!r} is not what the file's meta says: {'; '.join(wrong)}")
    return named


def _fields(switches: Mapping[str, Any]) -> dict[str, Any]:
    """Translate upstream's switches into fields of the grammar."""
    fields: dict[str, Any] = {"denominator": "one"}
    for switch, (field, values) in _SWITCHES.items():
        if switches[switch] not in values:
            raise Unsupported(f"{switch}={switches[switch]!r}")
        fields[field] = values[switches[switch]]
    fields["conv"] = switches["in_conv_dim"] if switches["use_in_conv"] else 0
    fields["value"] = switches["value_disc_dtype"]
    fields["decay"] = switches["A_mask_type"]
    if switches["norm_type"] == "sm_norm":
        fields["denominator"] = "sum"
    else:
        fields["norm"] = "rms_all"
    return fields


def _load(
    golden: Golden, config: MixerConfig, table: Names, dtype: np.dtype
) -> tuple[Loaded, Callable[[Values], Mixer]]:
    """Return the mixer with the file's parameters, and how to put it together from values."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return build(config, golden.meta["hidden_size"], init=uniform_init(), rngs=rngs)

    loaded = load_module(golden, make, table, dtype)
    return loaded, loaded.parts.merge_single


def _raw(mixer: Mixer, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Run a row as upstream does: padding is not seen, but its own outputs are computed too."""
    options = {"positions": None, "rngs": None, "implementation": "auto"}
    if segment_ids is not None:  # upstream counts positions through padding
        options["positions"] = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return mixer.mix(x, None, segment_ids=segment_ids, **options).y


def _attention(golden: Golden, config: MixerConfig, table: Names, dtype: np.dtype) -> list[Arrays]:
    loaded, _ = _load(golden, config, table, dtype)

    def run(mixer: Mixer, inputs: Values) -> Values:
        x, ids = inputs["hidden_states"], None
        if "lengths" in inputs:
            ids = (jnp.arange(x.shape[1]) < inputs["lengths"][:, None]).astype(jnp.int32)
        return {"y": _raw(mixer, x, ids)}

    return _without_tables(module_results(golden, loaded, run, dtype))


def _without_tables(runs: list[Arrays]) -> list[Arrays]:
    """Drop the gradients of rotary tables, which are inputs there and constants here."""
    return [{k: a for k, a in run.items() if k not in ("grad/cos", "grad/sin")} for run in runs]


def _layer(golden: Golden, config: MixerConfig, table: Names, dtype: np.dtype) -> list[Arrays]:
    feed_forward = SwiGLUConfig(hidden_dim=golden.meta["intermediate_size"])

    def make(rngs: nnx.Rngs) -> nnx.Module:
        dim, init = golden.meta["hidden_size"], uniform_init()
        return Block(config, feed_forward, dim, init=init, rngs=rngs, **_llama(golden))

    def run(block: Block, inputs: Values) -> Values:
        return {"y": block(inputs["hidden_states"], None).y}

    loaded = load_module(golden, make, names.block(table), dtype)
    return _without_tables(module_results(golden, loaded, run, dtype))


def _llama(golden: Golden) -> dict[str, Any]:
    return LLAMA | {"norm_eps": golden.meta["rms_norm_eps"]}


def _model(golden: Golden, config: MixerConfig, table: Names, dtype: np.dtype) -> list[Arrays]:
    meta = golden.meta
    whole = DecoderConfig(
        vocab_size=meta["vocab"],
        context_len=meta["T"],
        dim=meta["hidden_size"],
        depth=meta["layers"],
        mixer=config,
        feed_forward=SwiGLUConfig(hidden_dim=meta["intermediate_size"]),
        tie_embedding=False,
        **_llama(golden),
    )

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Decoder(whole, rngs=rngs, compute_dtype=dtype)

    loaded = load_module(golden, make, names.model(table), dtype)
    inputs = golden.inputs(dtype)
    ids = inputs["attention_mask"].astype(jnp.int32) if meta.get("right_padding") else None

    def loss(params: Values) -> tuple[jax.Array, jax.Array]:
        logits = _logits(loaded.parts.merge_single(params), inputs["input_ids"], ids)
        labels = inputs["labels"]
        scored = labels != -100
        chosen = jnp.where(scored, labels, 0)[..., None]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        return -jnp.sum(jnp.where(scored, picked, 0.0)) / jnp.sum(scored), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(loaded.params)
    outputs = {"logits": logits, "loss": value}
    return [keyed(outputs, to_original(loaded.names, grads))]


def _logits(model: Decoder, tokens: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Return logits, those of padding as upstream computes them."""
    if ids is None:
        return model(tokens).logits
    x = model.embedding(tokens, dtype=model.embedding.table[...].dtype)
    for block in model.blocks:
        x = x + _raw(block.mixer, block.norm_1(x), ids)
        x = x + block.feed_forward(block.norm_2(x)).y
    return model.head.logits(model.norm(x))


def _decode(golden: Golden, config: MixerConfig, table: Names, dtype: np.dtype) -> list[Arrays]:
    """Prefill some tokens at once and take the rest one by one."""
    loaded, merge = _load(golden, config, table, dtype)
    x = golden.inputs(dtype)["hidden_states"]
    length, prefill = x.shape[1], golden.meta["prefill"]

    @jax.jit
    def run(params: Values) -> Values:
        mixer = merge(params)
        state = mixer.init_state(x.shape[0], max_len=length, dtype=dtype)
        first = mixer(x[:, :prefill], state, form="chunked")
        found = {"y_parallel": mixer(x).y} | _sums(mixer, first.state, "after_prefill")

        def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            out = mixer.step(token, state)
            return out.state, out.y

        rest = jnp.moveaxis(x[:, prefill:], 1, 0)
        state, y = jax.lax.scan(step, first.state, rest)
        found["y_decode"] = jnp.concatenate([first.y, jnp.moveaxis(y, 0, 1)], axis=1)
        found |= _sums(mixer, state, "final")
        if getattr(state, "conv", None) is not None:
            found["state_conv_final"] = state.conv
        return found

    return [keyed(run(loaded.params))]


def _sums(mixer: Mixer, state: Any, when: str) -> Values:
    """Return sums over keys divided by the root of their width, as upstream keeps them."""
    sums = getattr(state, "sums", None)
    if sums is None:
        return {}
    width = mixer.dim // mixer.config.num_heads
    factor = 1.0 / width if mixer.config.kernel == "pow2" else width**-0.5
    found = {f"state_num_{when}": sums.memory * factor}
    return found if sums.total is None else found | {f"state_den_{when}": sums.total * factor}
