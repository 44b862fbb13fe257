"""Golden files of whole language models: loss and gradients, greedy text, a training run."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmem.backbones.decoder import Decoder
from jaxmem.interop.names import to_original
from jaxmem.parallel.mesh import ParallelConfig, build_mesh
from jaxmem.tasks.language_modeling import language_model_loss
from jaxmem.training.optim import OptimConfig, adamw, decay_groups, decays, learning_rate
from jaxmem.training.state import NEVER, TrainState, empty_interval
from jaxmem.training.step import Steps
from tests.golden.adapters import Arrays, Golden, Mismatch
from tests.golden.adapters.common import Loaded, Values, keyed


def model_results(golden: Golden, loaded: Loaded, dtype: np.dtype) -> list[Arrays]:
    """Return logits, mean loss, last logits, a greedy continuation, and the loss's gradients.

    Positions before `skip_tokens` are neither scored nor in the file. The continuation goes token
    by token through the model's state.
    """
    skip = golden.meta.get("skip_tokens", 0)
    idx, targets = (golden.inputs(dtype)[name] for name in ("idx", "targets"))
    continuation = golden.arrays.get("output/generated_top1")

    def loss(params: Values) -> tuple[jax.Array, jax.Array]:
        model = loaded.parts.merge_single(params)
        batch = {"tokens": idx, "targets": targets}
        scored = language_model_loss(model, batch, skip_tokens=skip)
        return scored.total / scored.count, model(idx).logits[:, skip:]

    @jax.jit
    def function(params: Values) -> tuple[Values, Values]:
        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        outputs = {"logits": logits, "loss": value, "last_logits": logits[:, -1:]}
        if continuation is not None:
            rows, start = prompt_shape(golden.meta)
            model = loaded.parts.merge_single(params)
            outputs["generated_top1"] = greedy(model, idx[:rows, :start], continuation.shape[1])
        return outputs, grads

    outputs, grads = function(loaded.params)
    return [keyed(outputs, to_original(loaded.names, grads))]


def prompt_shape(meta: dict[str, Any]) -> tuple[int, int]:
    """Read rows and tokens of the prompt out of "... continuation of idx[:1,:5]"."""
    found = re.search(r"idx\[:(\d+),\s*:(\d+)\]", meta["generated"])
    if found is None:
        raise Mismatch(f"cannot read the prompt out of {meta['generated']!r}")
    return int(found[1]), int(found[2])


def greedy(model: Decoder, prompt: jax.Array, length: int) -> jax.Array:
    """Continue the prompt to `length` tokens with the likeliest one at a time."""
    out = model(prompt, model.init_state(prompt.shape[0], max_len=length))

    def best(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(prompt.dtype)

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, state = carry
        out = model.step(token, state)
        return (best(out.logits), out.state), token

    first = (best(out.logits[:, -1]), out.state)
    _, tokens = lax.scan(step, first, length=length - prompt.shape[1])
    return jnp.concatenate([prompt, tokens.T], axis=1)


def training_results(golden: Golden, loaded: Loaded, dtype: np.dtype) -> list[Arrays]:
    """Run the project's own update for every batch of the file, in one program."""
    config = optim_config(golden.meta)
    check_decay_groups(golden.meta, loaded, config)
    layout = loaded.parts.layout
    inputs = golden.inputs(dtype)
    batches = {"tokens": inputs["idx"], "targets": inputs["targets"]}
    number = batches["tokens"].shape[0]
    schedule = learning_rate(config, number)
    optimizer = adamw(config, schedule, layout.map_shapes(decays))
    mesh = build_mesh(ParallelConfig())
    loss = partial(language_model_loss, skip_tokens=golden.meta.get("skip_tokens", 0))
    update = Steps(loaded.parts, loss, mesh).update(optimizer, config.clip_norm)

    @jax.jit
    def run(state: TrainState, batches: Values) -> tuple[TrainState, Any]:
        return lax.scan(update, state, batches)

    params = layout.stack(loaded.params)
    state = TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(0)),
        interval=empty_interval([]),
        first_bad_step=jnp.full((), NEVER, jnp.int32),
    )
    # A train state is float32 by design; under float64 its sums take the dtype of the update.
    after = jax.eval_shape(update, state, jax.tree.map(lambda x: x[0], batches))[0]
    state = jax.tree.map(lambda x, like: x.astype(like.dtype), state, after)
    state, report = run(state, batches)
    outputs = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": [schedule(i) for i in range(number)],
    }
    final = to_original(loaded.names, layout.unstack(state.params))
    final |= {alias: final[name] for alias, name in loaded.names.second_names(final).items()}
    return [keyed(outputs | {f"final/{name}": a for name, a in final.items()})]


def optim_config(meta: dict[str, Any]) -> OptimConfig:
    """Translate the optimiser of a golden training run."""
    found = re.fullmatch(r"AdamW eps (\S+)", meta["optimizer"])
    if found is None:
        raise Mismatch(f"cannot read the optimiser {meta['optimizer']!r}")
    return OptimConfig(
        lr=meta["lr"],
        min_lr=meta["min_lr"],
        warmup_steps=meta["warmup"],
        decay_steps=meta["decay_iters"],
        beta1=meta["betas"][0],
        beta2=meta["betas"][1],
        eps=float(found[1]),
        weight_decay=meta["weight_decay"],
        clip_norm=meta["grad_clip"],
    )


def check_decay_groups(meta: dict[str, Any], loaded: Loaded, config: OptimConfig) -> None:
    """Raise Mismatch unless the same parameters are decayed as in the original run."""
    shapes = {path: leaf.shape for path, leaf in loaded.parts.layout.shapes.items()}
    for key, group in zip(("decayed", "not_decayed"), decay_groups(shapes, config), strict=True):
        ours = {
            name for path in group.names for name in loaded.names.origin(path).names(shapes[path])
        }
        if different := ours ^ set(meta[key]):
            raise Mismatch(f"{key} parameters differ: {', '.join(sorted(different))}")
