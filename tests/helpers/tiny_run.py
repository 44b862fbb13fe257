"""A tiny model and a tiny run, for tests of training that must compile fast."""

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import jaxmem.cache
from jaxmem.backbones.base import ModelConfig, register_model
from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.data.config import DataConfig
from jaxmem.mixers.attention import AttentionConfig
from jaxmem.mixers.mlp import MLPConfig
from jaxmem.parallel.mesh import ParallelConfig
from jaxmem.training.config import RunConfig, RunOptions
from jaxmem.training.metrics import MACHINE_FIELDS
from jaxmem.training.optim import OptimConfig
from jaxmem.training.run import train
from jaxmem.training.stopping import EXIT_PREEMPTED

VOCAB = 11

KILL_RUN = {"steps": 30, "eval_every": 2, "log_every": 3}
"""Checkpoints so often that most of the time is spent writing them."""

# A start of a run compiles what the start before it did, in functions of its own: programs that
# compile faster than the cache usually cares for, but often.
jaxmem.cache.MIN_COMPILE_SECONDS = 0.05

TINY_MODEL = DecoderConfig(
    context_len=8,
    dim=8,
    depth=1,
    mixer=AttentionConfig(num_heads=2, dropout=0.1),
    feed_forward=MLPConfig(),
)


class Output(NamedTuple):
    logits: jax.Array
    state: Any
    aux: dict[str, jax.Array]


class Layer(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs, dropout: float):
        self.linear = nnx.Linear(dim, dim, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        y = jnp.tanh(self.linear(x))
        if rngs is None or not self.dropout:
            return x + y
        return x + y * jax.random.bernoulli(rngs.dropout(), 1 - self.dropout, y.shape)


class TinyModel(nnx.Module):
    """Embeds, mixes per token in a few layers, reads out; like a Decoder to the trainer."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        vocab: int = VOCAB,
        dim: int = 8,
        depth: int = 2,
        dropout: float = 0.0,
        aux: bool = False,
    ):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (vocab, dim)))
        self.layers = nnx.List([Layer(dim, rngs, dropout) for _ in range(depth)])
        self.head = nnx.Linear(dim, vocab, rngs=rngs)
        self.aux = aux

    def __call__(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, rngs: Any = None
    ) -> Output:
        x = self.embed[...][tokens]
        for layer in self.layers:
            x = layer(x, rngs)
        size = jnp.mean(jnp.square(x))
        aux = {"loss_size": 0.1 * size, "size": size} if self.aux else {}
        return Output(self.head(x), None, aux)


@register_model("light")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LightConfig(ModelConfig):
    """For tests of the loop around a model, which need nothing of it but dropout."""

    vocab_size: int = 0
    depth: int = 1
    dropout: float = 0.1

    def build(self, rngs: nnx.Rngs, compute_dtype: Any = jnp.float32) -> TinyModel:
        """Build it; all runs of it compute in float32."""
        return TinyModel(rngs, vocab=self.vocab_size, depth=self.depth, dropout=self.dropout)


LIGHT_MODEL = LightConfig(context_len=8)


def tiny_batch(rows: int, *, length: int = 5, seed: int = 0, scored: float = 1.0) -> dict[str, Any]:
    """Random tokens; each target is scored with this probability."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
    targets = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.where(rng.random((rows, length)) < scored, targets, -1).astype(np.int32),
    }


def tiny_run(folder: Path, *, run: dict | None = None, **changes: Any) -> RunConfig:
    """A run of a one-block transformer on a text of its own, 1 s to compile."""
    text = folder.parent / "text.txt"
    if not text.exists():
        words = np.random.default_rng(0).choice(["ab ", "bca ", "cd ", "dda\n"], 3000)
        text.write_text("".join(words))
    options = {"steps": 12, "eval_every": 4, "eval_batches": 2, "log_every": 3, "dir": str(folder)}
    config = RunConfig(
        model=TINY_MODEL,
        data=DataConfig(path=str(text), batch_size=8),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, decay_steps=12),
        parallel=ParallelConfig(),
        run=RunOptions(**(options | (run or {}))),
    )
    return dataclasses.replace(config, **changes)


def with_run(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other run options."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics without the fields that measure the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MACHINE_FIELDS} for row in parsed]


def saved_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by item and name."""
    reader = ocp.StandardCheckpointer()
    found = {}
    for item in ("params", "opt_state", "loop"):
        tree = reader.restore((folder / "checkpoints" / str(step) / item).absolute())
        found |= {f"{item}/{name}": np.asarray(x) for name, x in tree.items()}
    return found


def serve() -> None:
    """Train the run of the kill tests in a child for each folder that is named on stdin.

    What a run needs is imported here once, but JAX is used by the children only: a process with its
    threads could not fork. A child says its process id at first, this process its exit code.
    """
    for name in ("cattrs", "tensorboardX", "pallas_kernels"):  # which a run imports when it begins
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_train_to_be_killed(Path(line.strip())))
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _train_to_be_killed(folder: Path) -> int:
    try:
        print("pid", os.getpid(), flush=True)
        result = train(tiny_run(folder, run=KILL_RUN, model=LIGHT_MODEL), command=sys.argv)
    except BaseException:
        traceback.print_exc()
        return 1
    return EXIT_PREEMPTED if result.stopped == "preempted" else 0


if __name__ == "__main__":
    serve()
