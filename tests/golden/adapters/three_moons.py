"""Golden files of ThreeMoons: the memory with its generations, and the series it is trained on."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.backbones.three_moons import ThreeMoons, ThreeMoonsConfig, continue_series
from jaxmem.data.three_moons import (
    TRAIN_PERIODS,
    VALIDATION_PERIODS,
    positions,
    system_period,
    time_step,
)
from jaxmem.interop.names import Names, Origin, linear, to_original
from jaxmem.tasks.three_moons import clipped_square_sum
from tests.golden.adapters import Arrays, Golden
from tests.golden.adapters.common import Values, keyed, load_module

SYSTEM = "memory_mosaics"

NAMES = (
    linear("emb", "embedding")
    | linear("k_lin", "key")
    | linear("v_lin", "value")
    | linear("out_proj", "output")
    | Names({"key_scale": Origin("k_scale")})
)


def recognises(meta: Mapping[str, Any]) -> bool:
    """Say whether the file's module belongs to ThreeMoons."""
    return str(meta.get("module", "")).startswith("ThreeMoons")


def compute(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Return this project's arrays for the file."""
    if "data" in golden.meta["module"]:
        return [_series(golden)]
    return _memory(golden, dtype)


def _config(meta: Mapping[str, Any]) -> ThreeMoonsConfig:
    """Translate the options of the original.

    It reads `bias` nowhere, and `out_sum` only without `out_proj`.
    """
    summed = "sum" if meta["out_sum"] else "concat"
    return ThreeMoonsConfig(
        context_len=meta["block_size"],
        input_dim=meta["input_dim"],
        num_heads=meta["n_head"],
        head_dim=meta["h_dim"],
        complex_linear=meta["complex"],
        use_embedding=meta["emb"],
        normalise_keys=meta["norm_keys"],
        normalise_values=meta["norm_vals"],
        learn_key_scale=meta["scale_keys"],
        attention_scale=float(meta["attn_scale"]),
        value_shift=meta["v_shift"],
        value_ban=meta["v_ban"],
        output="projection" if meta["out_proj"] else summed,
    )


def _memory(golden: Golden, dtype: np.dtype) -> list[Arrays]:
    """Run the memory, differentiate its loss, and go on from a prompt in all three ways."""
    config = _config(golden.meta)

    def make(rngs: nnx.Rngs) -> ThreeMoons:
        return ThreeMoons(config, rngs=rngs, compute_dtype=dtype)

    loaded = load_module(golden, make, NAMES, dtype)
    inputs = golden.inputs(dtype)
    prompt = golden.meta["prompt"]
    steps = golden.arrays["output/generated_recompute"].shape[1]

    def loss(params: Values, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = loaded.parts.merge_single(params)(x)
        total, count = clipped_square_sum(y, inputs["target"])
        return total / count, y

    @jax.jit
    def function(params: Values, x: jax.Array) -> tuple[Values, Values, jax.Array]:
        model = loaded.parts.merge_single(params)
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, y), (by_params, by_x) = grad(params, x)
        key, stored = model.pairs(x)
        start = x[:, :prompt]
        released = continue_series(model, start, steps, method="released")
        outputs = {
            "y": y,
            "loss": value,
            "att": model.attention_weights(x),
            "k": key.swapaxes(1, 2),
            "v": stored.swapaxes(1, 2),
            # The original returns the outputs at the prompt as well.
            "generated_cached": jnp.concatenate([model(start), released], axis=1),
            "generated_recompute": continue_series(model, start, steps, method="recompute"),
            "generated_filled": continue_series(model, start, steps, method="cached"),
        }
        return outputs, by_params, by_x

    outputs, by_params, by_x = function(loaded.params, inputs["x"])
    # The original has no cached generation that stores its values; ours must equal a recompute.
    filled = {"generated_recompute": outputs.pop("generated_filled")}
    results = keyed(outputs, to_original(loaded.names, by_params), {"x": by_x})
    return [results, results | keyed(filled)]


def _series(golden: Golden) -> Arrays:
    """Make every series that the file names; float64 throughout, as the original is run."""
    steps = golden.meta["block_size"]
    results: Arrays = {
        "output/train_periods": np.array(TRAIN_PERIODS),
        "output/val_periods": np.array(VALIDATION_PERIODS),
        "output/full_periods": np.array(
            [system_period(p) for p in (*TRAIN_PERIODS, *VALIDATION_PERIODS)]
        ),
    }
    for name, periods in golden.group("input").items():
        found = re.fullmatch(r"periods_(?P<case>(?P<observer>[a-z]+)_\w+)", name)
        if found is None:
            continue
        case, observer = found["case"], found["observer"]
        step = time_step(steps, observer)
        start = int(golden.arrays[f"input/start_{case}"])
        series = positions(tuple(periods), start, steps + 1, step=step, observer=observer)
        results |= {
            f"output/x_{case}": series[:-1],
            f"output/y_{case}": series[1:],
            f"output/step_{observer}": np.array(step),
            f"output/period_steps_{case}": periods / step,
            f"output/full_period_steps_{case}": np.array(system_period(tuple(periods)) / step),
        }
    return results
