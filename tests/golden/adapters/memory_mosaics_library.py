"""Golden files of the Library of Memory Mosaics, in both its variants."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.interop import memory_mosaics as names
from jaxmem.interop.names import Names, to_original, to_ours
from jaxmem.mixers.mosaic import LIBRARY_LIMIT, ContextualMemoryConfig, PersistentMemoryConfig
from jaxmem.nn.features import Extractor, FeatureExtractor
from jaxmem.nn.init import gpt2_init
from jaxmem.ops.norms import l2_normalise
from jaxmem.ops.persistent_read import persistent_read
from tests.golden.adapters import Arrays, Golden, Mismatch, Unsupported, cast
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

EXTRACTORS: dict[str, Extractor] = {"linearconv": "conv", "lowrlinearconv": "mix"}


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file's module is one of the kinds below."""
    return kind_of(meta, KINDS) is not None


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file."""
    kind = kind_of(golden.meta, KINDS)
    if kind is None:
        raise Unsupported(f"no module yet for {golden.meta['module']!r}")
    return kind(golden, dtype)


def _extractor(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    meta = golden.meta
    kind = EXTRACTORS[meta["fe_type"]]

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return FeatureExtractor(
            meta["n_embd"],
            meta["n_head"],
            kind,
            kernel_size=meta["kernel_size"],
            shift=meta["shift"],
            use_bias=use_bias(golden),
            init=gpt2_init(1),
            rngs=rngs,
        )

    def run(module: FeatureExtractor, inputs: Values) -> Values:
        features = module.look_ahead(inputs["x"])
        return {"y": (l2_normalise(features) if meta["norm"] else features).swapaxes(1, 2)}

    return part_results(golden, make, names.library_extractor(kind), run, dtype)


def _tables(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Read the persistent pairs for given queries (B, H, T, K)."""
    meta = golden.meta
    shape = (meta["pmem_count"], meta["n_head"], meta["pmem_size"], meta["pmem_dim"])
    stored = to_ours(names.LIBRARY_TABLES, golden.group("param"), {"keys": shape, "values": shape})
    scale = jnp.full(shape[1], meta["softmax_scale"], dtype)

    def forward(params: Values, inputs: Values) -> Values:
        queries = inputs["key"].swapaxes(1, 2)
        y = persistent_read(queries, params["keys"], params["values"], scale=scale)
        return {"y": y.swapaxes(1, 2)}

    function = with_gradients(forward, cast(golden.group("cotangent"), dtype))
    outputs, grads, input_grads = function(cast(stored, dtype), golden.inputs(dtype))
    return [keyed(outputs, to_original(names.LIBRARY_TABLES, grads), input_grads)]


def _is_eft(golden: Golden) -> bool:
    return any("leaky_average." in name for name in golden.group("param"))


def _key_options(golden: Golden) -> dict[str, Any]:
    """Return what both memories have; the variant `eft` knows keys of one token only."""
    meta = golden.meta
    if meta.get("ic_dropout") or meta.get("hd_dropout"):
        raise Mismatch("the file was made with dropout, whose masks cannot be known")
    return {
        "num_heads": meta["n_head"],
        "key_extractor": EXTRACTORS[meta.get("k_fe_type", "linearconv")],
        "key_kernel_size": 1 if _is_eft(golden) else meta.get("k_kernel_size", 1),
        "scale_limit": LIBRARY_LIMIT,
        "use_bias": use_bias(golden),
    }


def _contextual(golden: Golden) -> tuple[ContextualMemoryConfig, Names]:
    config = ContextualMemoryConfig(
        value_extractor=EXTRACTORS[golden.meta["v_fe_type"]],
        value_kernel_size=golden.meta["v_kernel_size"],
        lag=golden.meta["v_shift"],
        **_key_options(golden),
    )
    kinds = config.key_extractor, config.value_extractor
    return config, names.library_contextual(*kinds, eft=_is_eft(golden))


def _persistent(golden: Golden) -> tuple[PersistentMemoryConfig, Names]:
    config = PersistentMemoryConfig(
        memory_size=golden.meta["pmem_size"],
        num_banks=golden.meta["pmem_count"],
        **_key_options(golden),
    )
    return config, names.library_persistent(config.key_extractor, eft=_is_eft(golden))


Slots = tuple[ContextualMemoryConfig, PersistentMemoryConfig | None]


def _slots(golden: Golden) -> tuple[Slots, Names]:
    """Return both slots of a block, and its names."""
    (first, contextual), (second, persistent) = _contextual(golden), _persistent(golden)
    slots = (first, None if golden.meta["attn_only"] else second)
    return slots, names.library_block(contextual, persistent)


def _norm(golden: Golden) -> str:
    return "pre" if golden.meta["pre_ln"] else "post"


def _contextual_results(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    return mixer_results(golden, *_contextual(golden), dtype)


def _persistent_results(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    return mixer_results(golden, *_persistent(golden), dtype)


def _block_results(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    return block_results(golden, *_slots(golden), dtype, norm=_norm(golden))


def _model_results(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    slots, block = _slots(golden)
    return decoder_results(
        golden,
        slots,
        names.library_model(block),
        dtype,
        norm=_norm(golden),
        tie_embedding=golden.meta["weight_tying"],
        scale_logits=True,
    )


KINDS: tuple[tuple[str, Compute], ...] = (
    (r"^Library FeatureExtractor", _extractor),
    (r"^Library Pmem", _tables),
    (r"^Library contextual memory", _contextual_results),
    (r"^Library persistent memory", _persistent_results),
    (r"^Library block", _block_results),
    (r"^Library StackAssoMem", _model_results),
)
