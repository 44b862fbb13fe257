"""What the adapters of Memory Mosaics share: how parts, blocks and models are rebuilt and run."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxmem.backbones.block import Block
from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.interop.names import Names
from jaxmem.mixers.base import Mixer, MixerConfig, build
from jaxmem.nn.init import gpt2_init
from tests.golden.adapters import Arrays, Golden
from tests.golden.adapters.common import Values, load_module, module_results
from tests.golden.adapters.language_model import model_results, training_results

Compute = Callable[[Golden, np.dtype], list[Arrays]]
Kinds = Iterable[tuple[str, Compute]]
"""Pattern of the original module's name -> how to rebuild it."""


def kind_of(meta: Mapping[str, Any], kinds: Kinds) -> Compute | None:
    """Find the first kind whose pattern occurs in the name of the original module."""
    module = str(meta.get("module", ""))
    return next((kind for pattern, kind in kinds if re.search(pattern, module)), None)


def use_bias(golden: Golden) -> bool:
    """Read `bias`; where the files of a part leave it out, its parameters tell."""
    fallback = any(name.endswith(".bias") for name in golden.group("param"))
    return bool(golden.meta.get("bias", fallback))


def part_results(
    golden: Golden,
    make: Callable[[nnx.Rngs], nnx.Module],
    names: Names,
    run: Callable[[Any, Values], Values],
    dtype: np.dtype,
) -> list[Arrays]:
    """Build a module, give it the file's parameters, run and differentiate it."""
    return module_results(golden, load_module(golden, make, names, dtype), run, dtype)


def mixer_results(
    golden: Golden, config: MixerConfig, names: Names, dtype: np.dtype
) -> list[Arrays]:
    """Run a mixer on whole rows."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return build(config, golden.meta["n_embd"], init=gpt2_init(1), rngs=rngs)

    def run(module: Mixer, inputs: Values) -> Values:
        return {"y": module(inputs["x"]).y}

    return part_results(golden, make, names, run, dtype)


def block_results(
    golden: Golden,
    slots: tuple[MixerConfig, MixerConfig | None],
    names: Names,
    dtype: np.dtype,
    **options: Any,
) -> list[Arrays]:
    """Run a block on whole rows; `options` are those of `Block`."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Block(
            *slots,
            golden.meta["n_embd"],
            use_bias=use_bias(golden),
            init=gpt2_init(1),
            rngs=rngs,
            **options,
        )

    def run(module: Block, inputs: Values) -> Values:
        return {"y": module(inputs["x"], None).y}

    return part_results(golden, make, names, run, dtype)


def decoder_results(
    golden: Golden,
    slots: tuple[MixerConfig, MixerConfig | None],
    names: Names,
    dtype: np.dtype,
    **options: Any,
) -> list[Arrays]:
    """Run a model: one evaluation, or a training run if the file has an optimiser.

    `options` are those of `DecoderConfig`.
    """
    config = DecoderConfig(
        vocab_size=golden.meta["vocab_size"],
        context_len=golden.meta["block_size"],
        dim=golden.meta["n_embd"],
        depth=golden.meta["n_layer"],
        mixer=slots[0],
        feed_forward=slots[1],
        use_bias=use_bias(golden),
        **options,
    )

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Decoder(config, rngs=rngs, compute_dtype=dtype)

    run = training_results if "optimizer" in golden.meta else model_results
    return run(golden, load_module(golden, make, names, dtype), dtype)
