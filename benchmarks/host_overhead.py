"""Host time per training step of a 12-layer model that computes next to nothing.

The main thread's CPU time around the trainer's own step: next batch, placement, jitted call and
guard. On CPU some of the computation runs on the main thread as well, so this is an upper bound.
"""

import dataclasses
import sys
import time

import jax
import numpy as np

import configs
from jaxmem.parallel.mesh import batch_sharding, build_mesh
from jaxmem.tasks.language_modeling import language_model_loss
from jaxmem.training.model import PRECISIONS, Model
from jaxmem.training.optim import adamw, decays, learning_rate
from jaxmem.training.state import StateInit
from jaxmem.training.step import Steps

STEPS = 300


def main() -> None:
    """Measure a Memory Mosaic of 12 layers, width 4, on batches of two tokens."""
    config = configs.load("mm_gpt2")
    slots = {"num_heads": 1}
    model_config = dataclasses.replace(
        config.model,
        vocab_size=8,
        context_len=2,
        dim=4,
        mixer=dataclasses.replace(config.model.mixer, **slots),
        feed_forward=dataclasses.replace(config.model.feed_forward, memory_size=2, **slots),
    )
    config = dataclasses.replace(
        config,
        model=model_config,
        data=dataclasses.replace(config.data, batch_size=1),
        optim=dataclasses.replace(config.optim, accumulate=1),
        run=dataclasses.replace(config.run, precision="float32"),
    )
    model = Model(config.model, PRECISIONS["float32"])
    mesh = build_mesh(config.parallel)
    sharding = batch_sharding(mesh)
    numbers = np.zeros((1, 2), np.int32)
    batch = {"tokens": numbers, "targets": numbers}
    steps = Steps(model.parts, language_model_loss, mesh)
    schedule = learning_rate(config.optim, config.run.steps)
    optimizer = adamw(config.optim, schedule, model.parts.layout.map_shapes(decays))
    init = StateInit(model.make, model.parts, optimizer, steps.aux_names(batch), mesh)
    state = init(0)
    update = jax.jit(steps.update(optimizer, 1.0), donate_argnums=0)
    placed = jax.device_put(batch, sharding)
    update = update.lower(state, placed).compile()

    def run(count: int) -> float:
        nonlocal state
        start = time.thread_time()
        for _ in range(count):
            placed = jax.device_put(batch, sharding)
            state, _ = update(state, placed)
        spent = time.thread_time() - start
        jax.block_until_ready(state)
        return spent / count

    run(20)
    best = min(run(STEPS) for _ in range(5))
    arrays = len(jax.tree.leaves(state))
    print(f"jax {jax.__version__}: {1e3 * best:.2f} ms per step, {arrays} arrays in the state")
    sys.exit(best > 1e-3)


if __name__ == "__main__":
    main()
