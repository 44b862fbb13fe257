"""Golden files of Memory Mosaics: leaky averages, nanoMosaics and both GPTs."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxmem.backbones.block import Block
from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.interop import memory_mosaics as names
from jaxmem.interop.names import Names
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.base import Mixer, MixerConfig, build
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import (
    ContextualMemoryConfig,
    KeyExtractor,
    PersistentMemoryConfig,
    ValueExtractor,
)
from jaxmem.nn.init import gpt2_init
from jaxmem.ops.dispatch import Implementation, implementations
from jaxmem.ops.leaky_average import decay_rate, leaky_average
from tests.golden.adapters import Arrays, Golden, Unsupported, cast
from tests.golden.adapters.common import (
    Values,
    keyed,
    load_module,
    module_results,
    with_gradients,
)
from tests.golden.adapters.language_model import model_results, training_results

Meta = Mapping[str, Any]
Compute = Callable[[Golden, np.dtype], list[Arrays]]


def recognises(meta: Meta) -> bool:
    """Say whether the file's module is one of the kinds below."""
    return _kind(meta) is not None


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file, per implementation where an op has several."""
    kind = _kind(golden.meta)
    if kind is None:
        raise Unsupported(f"no module yet for {golden.meta['module']!r}")
    return kind(golden, dtype)


def _kind(meta: Meta) -> Compute | None:
    """Find the first kind whose pattern occurs in the name of the original module."""
    module = str(meta.get("module", ""))
    return next((kind for pattern, kind in KINDS if re.search(pattern, module)), None)


def _leaky_average(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Run the op on (B, H, T, K) inputs in every implementation it has."""

    def forward(implementation: Implementation, params: Values, inputs: Values) -> Values:
        y, _ = leaky_average(
            inputs["x"].swapaxes(1, 2),
            decay_rate(params["leaky_beta"]),
            scaling=golden.meta["kind"],
            implementation=implementation,
        )
        return {"y": y.swapaxes(1, 2)}

    cotangents = cast(golden.group("cotangent"), dtype)

    @jax.jit
    def function(params: Values, inputs: Values) -> list[tuple[Values, Values, Values]]:
        forwards = (partial(forward, name) for name in implementations("leaky_average"))
        return [with_gradients(f, cotangents)(params, inputs) for f in forwards]

    runs = function(cast(golden.group("param"), dtype), golden.inputs(dtype))
    return [keyed(outputs, *grads) for outputs, *grads in runs]


def _use_bias(golden: Golden) -> bool:
    """Read `bias`; where the files of a part leave it out, its parameters tell."""
    fallback = any(name.endswith(".bias") for name in golden.group("param"))
    return bool(golden.meta.get("bias", fallback))


def _key_extractor(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    power = golden.meta["scale_pow"]

    def run(module: KeyExtractor, inputs: Values) -> Values:
        keys, _ = module(inputs["x"], None)
        return {"y": keys.swapaxes(1, 2) * module.key_scale(power)[:, None, None]}

    return _extractor(golden, dtype, KeyExtractor, names.MOSAIC_KEY, run)


def _value_extractor(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    def run(module: ValueExtractor, inputs: Values) -> Values:
        return {"y": module(module.projection(inputs["x"])).swapaxes(1, 2)}

    return _extractor(golden, dtype, ValueExtractor, names.MOSAIC_VALUE, run)


def _extractor(
    golden: Golden,
    dtype: np.dtype,
    extractor: type[nnx.Module],
    table: Names,
    run: Callable[[Any, Values], Values],
) -> list[Arrays]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        dim, heads = golden.meta["n_embd"], golden.meta["n_head"]
        return extractor(dim, heads, use_bias=_use_bias(golden), init=gpt2_init(1), rngs=rngs)

    return module_results(golden, load_module(golden, make, table, dtype), run, dtype)


def _contextual(golden: Golden) -> MixerConfig:
    return ContextualMemoryConfig(num_heads=golden.meta["n_head"], use_bias=_use_bias(golden))


def _persistent(golden: Golden) -> MixerConfig:
    return PersistentMemoryConfig(
        num_heads=golden.meta["n_head"],
        memory_size=golden.meta["pmem_size"],
        num_banks=golden.meta.get("pmem_count", 1),
        use_bias=_use_bias(golden),
    )


def _attention(golden: Golden) -> MixerConfig:
    return AttentionConfig(num_heads=golden.meta["n_head"], use_bias=_use_bias(golden))


def _mlp(golden: Golden) -> MixerConfig:
    """Return a GPT's feed-forward layer: Library's GELU is the tanh approximation, nano's exact."""
    module = golden.meta["module"]
    tanh = "tanh" in module or (module.startswith("Library") and "erf" not in module)
    return MLPConfig(activation="gelu_tanh" if tanh else "gelu", use_bias=_use_bias(golden))


class Family(NamedTuple):
    """A model family: its two slots, its names, and how it tells positions."""

    slots: tuple[Callable[[Golden], MixerConfig], Callable[[Golden], MixerConfig]]
    block: Names
    model: Names
    positions: str


MOSAIC = Family((_contextual, _persistent), names.MOSAIC_BLOCK, names.MOSAIC, "none")
GPT = Family((_attention, _mlp), names.GPT_BLOCK, names.GPT, "learned")


def _mixer(
    config: Callable[[Golden], MixerConfig], table: Names, golden: Golden, dtype: np.dtype
) -> list[Arrays]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return build(config(golden), golden.meta["n_embd"], init=gpt2_init(1), rngs=rngs)

    def run(module: Mixer, inputs: Values) -> Values:
        return {"y": module(inputs["x"]).y}

    return module_results(golden, load_module(golden, make, table, dtype), run, dtype)


def _block(family: Family, golden: Golden, dtype: np.dtype) -> list[Arrays]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Block(
            *(slot(golden) for slot in family.slots),
            golden.meta["n_embd"],
            use_bias=_use_bias(golden),
            init=gpt2_init(1),
            rngs=rngs,
        )

    def run(module: Block, inputs: Values) -> Values:
        return {"y": module(inputs["x"], None).y}

    loaded = load_module(golden, make, family.block, dtype)
    return module_results(golden, loaded, run, dtype)


def _model(family: Family, golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Run a whole model: one evaluation, or a training run if the file has an optimiser."""
    mixer, feed_forward = (slot(golden) for slot in family.slots)
    config = DecoderConfig(
        vocab_size=golden.meta["vocab_size"],
        context_len=golden.meta["block_size"],
        dim=golden.meta["n_embd"],
        depth=golden.meta["n_layer"],
        mixer=mixer,
        feed_forward=feed_forward,
        positions=family.positions,
        use_bias=_use_bias(golden),
    )

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Decoder(config, rngs=rngs, compute_dtype=dtype)

    run = training_results if "optimizer" in golden.meta else model_results
    return run(golden, load_module(golden, make, family.model, dtype), dtype)


_RELEASE = r"^(nanoMosaics|Library)\b.*"

KINDS: tuple[tuple[str, Compute], ...] = (
    (r"^leaky average", _leaky_average),
    (r"^nanoMosaics key extractor", _key_extractor),
    (r"^nanoMosaics value extractor", _value_extractor),
    (r"^nanoMosaics ContextMem", partial(_mixer, _contextual, names.MOSAIC_CONTEXTUAL)),
    (r"^nanoMosaics PersistentMem", partial(_mixer, _persistent, names.MOSAIC_PERSISTENT)),
    (r"^nanoMosaics Block", partial(_block, MOSAIC)),
    (r"^nanoMosaics MemoryMosaic", partial(_model, MOSAIC)),
    (
        _RELEASE + "causal attention",
        partial(_mixer, _attention, names.GPT_ATTENTION),
    ),
    (_RELEASE + "GPT block", partial(_block, GPT)),
    (_RELEASE + r"GPT\b", partial(_model, GPT)),
)
"""Pattern of the original module's name -> how to rebuild it; the first that occurs counts."""
