"""Golden files of Memory Mosaics: leaky averages, nanoMosaics and both GPTs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.interop import memory_mosaics as names
from jaxmem.interop.names import Names
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.base import MixerConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.mixers.mosaic import NANO_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.nn.features import KeyExtractor, ValueExtractor
from jaxmem.nn.init import gpt2_init
from jaxmem.ops.dispatch import Implementation, implementations
from jaxmem.ops.leaky_average import decay_rate, leaky_average
from tests.golden.adapters import Arrays, Golden, Unsupported, cast
from tests.golden.adapters.common import Values, keyed, with_gradients
from tests.golden.adapters.modules import (
    Compute,
    block_results,
    decoder_results,
    kind_of,
    mixer_results,
    part_results,
    use_bias,
)

SYSTEM = "memory_mosaics"


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file's module is one of the kinds below."""
    return kind_of(meta, KINDS) is not None


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file, per implementation where an op has several."""
    kind = kind_of(golden.meta, KINDS)
    if kind is None:
        raise Unsupported(f"no module yet for {golden.meta['module']!r}")
    return kind(golden, dtype)


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
        # Kernels know no float64.
        forms = [
            f for f in implementations("leaky_average") if f != "pallas" or dtype != np.float64
        ]
        forwards = (partial(forward, form) for form in forms)
        return [with_gradients(f, cotangents)(params, inputs) for f in forwards]

    runs = function(cast(golden.group("param"), dtype), golden.inputs(dtype))
    return [keyed(outputs, *grads) for outputs, *grads in runs]


def _key_extractor(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Multiply unit keys by their scale, of which a query for stored pairs has the square."""
    power = golden.meta["scale_pow"]

    def make(rngs: nnx.Rngs) -> nnx.Module:
        limit = {"scale_limit": 2 * NANO_LIMIT / power}
        return _extractor(KeyExtractor, golden, rngs, "conv", kernel_size=1, **limit)

    def run(module: KeyExtractor, inputs: Values) -> Values:
        keys, _ = module(inputs["x"], None)
        scale = module.logit_scale() if power == 2 else jnp.sqrt(module.logit_scale())
        return {"y": keys.swapaxes(1, 2) * scale[:, None, None]}

    return part_results(golden, make, names.MOSAIC_KEY, run, dtype)


def _value_extractor(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return _extractor(ValueExtractor, golden, rngs, "mix", kernel_size=2, shift=1)

    def run(module: ValueExtractor, inputs: Values) -> Values:
        return {"y": module(inputs["x"]).swapaxes(1, 2)}

    return part_results(golden, make, names.MOSAIC_VALUE, run, dtype)


def _extractor(
    kind: Callable[..., nnx.Module], golden: Golden, rngs: nnx.Rngs, *args: Any, **options: Any
) -> nnx.Module:
    dim, heads = golden.meta["n_embd"], golden.meta["n_head"]
    options |= {"use_bias": use_bias(golden), "init": gpt2_init(1), "rngs": rngs}
    return kind(dim, heads, *args, **options)


def _contextual(golden: Golden) -> MixerConfig:
    return ContextualMemoryConfig(num_heads=golden.meta["n_head"], use_bias=use_bias(golden))


def _persistent(golden: Golden) -> MixerConfig:
    return PersistentMemoryConfig(
        num_heads=golden.meta["n_head"],
        memory_size=golden.meta["pmem_size"],
        num_banks=golden.meta.get("pmem_count", 1),
        use_bias=use_bias(golden),
    )


def _attention(golden: Golden) -> MixerConfig:
    return AttentionConfig(num_heads=golden.meta["n_head"], use_bias=use_bias(golden))


def _mlp(golden: Golden) -> MixerConfig:
    """Return a GPT's feed-forward layer: Library's GELU is the tanh approximation, nano's exact."""
    module = golden.meta["module"]
    tanh = "tanh" in module or (module.startswith("Library") and "erf" not in module)
    return MLPConfig(activation="gelu_tanh" if tanh else "gelu", use_bias=use_bias(golden))


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
    return mixer_results(golden, config(golden), table, dtype)


def _block(family: Family, golden: Golden, dtype: np.dtype) -> list[Arrays]:
    first, second = (slot(golden) for slot in family.slots)
    return block_results(golden, (first, second), family.block, dtype)


def _model(family: Family, golden: Golden, dtype: np.dtype) -> list[Arrays]:
    first, second = (slot(golden) for slot in family.slots)
    options = {"positions": family.positions}
    return decoder_results(golden, (first, second), family.model, dtype, **options)


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
