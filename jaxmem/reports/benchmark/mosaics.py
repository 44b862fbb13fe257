"""Training steps of Memory Mosaics: a recurrence against a (T, T) matrix, as the authors compare.

Reference: Memory Mosaics, Library's tables of speed and memory on two Quadro GV100, batch per GPU.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from flax import nnx

from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.errors import ConfigError
from jaxmem.ops.leaky_average import LeakyOutput, LeakyState
from jaxmem.reports.benchmark import baselines, result, timing
from jaxmem.tasks.language_modeling import language_model_loss
from jaxmem.training.layout import ModelParts, init_params, take_apart
from jaxmem.training.model import PRECISIONS
from jaxmem.training.optim import OptimConfig, adamw, clip_by_norm, decays
from pallas_kernels import _deviceless

Form = Literal["recurrence", "T x T matrix"]


class Row(NamedTuple):
    """A line of the authors' tables."""

    table: str
    """Title of the table that it stands in."""
    preset: str
    values: Literal["conv", "mix"]
    """Value extractor: `linearconv` or `lowrlinearconv` in the authors' terms."""
    block: int
    batch: int
    form: Form
    published_ms: float
    """Compiled, on two Quadro GV100."""
    published_gb: float


_FORMS, _LARGER = "Recurrence against T x T matrix", "Larger models"
ROWS = (
    Row(_FORMS, "mm_babistories", "conv", 512, 8, "recurrence", 189, 7.7),
    Row(_FORMS, "mm_babistories", "conv", 512, 8, "T x T matrix", 190, 9.4),
    Row(_FORMS, "mm_babistories", "conv", 2048, 2, "recurrence", 247, 9.0),
    Row(_FORMS, "mm_babistories", "conv", 2048, 2, "T x T matrix", 301, 17.4),
    Row(_LARGER, "mm_354m", "mix", 1024, 1, "recurrence", 254, 9.1),
    Row(_LARGER, "mm_756m", "mix", 1024, 1, "recurrence", 439, 16.2),
    Row(_LARGER, "mm_354m", "mix", 2048, 1, "recurrence", 415, 12.9),
)
STEP_DEVICE = "NVIDIA H200"
"""Device that full-size steps are compiled for where there is none."""
PRESETS = tuple(dict.fromkeys(row.preset for row in ROWS))
_NOTES = (
    "Published: compiled, float16, two Quadro GV100, batch per GPU (Memory Mosaics).",
    "Values: conv is the authors' linearconv, mix their lowrlinearconv.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step on one device: loss, gradient, clipping, AdamW."""

    config: DecoderConfig
    batch: int
    precision: str
    form: Form
    parts: ModelParts = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", take_apart(self._make))

    def __reduce__(self) -> tuple:
        """Pickle what the parts are made from, not the parts."""
        return Step, (self.config, self.batch, self.precision, self.form)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.parts.layout.stacked_shapes.values())

    def make_state(self) -> tuple[Any, Any]:
        """Return parameters and optimiser state."""
        params = init_params(self._make, self.parts, jax.random.key(0))
        return params, self._optimizer().init(params)

    def tokens(self) -> np.ndarray:
        """Return a random batch, one token longer than the rows."""
        shape = (self.batch, self.config.context_len + 1)
        return np.random.default_rng(0).integers(self.config.vocab_size, size=shape, dtype=np.int32)

    def __call__(self, state: tuple[Any, Any], tokens: jax.Array) -> tuple[Any, jax.Array]:
        """Return the state after an update, and the mean loss."""
        params, opt_state = state

        def loss(params: Any) -> jax.Array:
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
            rngs = nnx.Rngs(dropout=jax.random.key(1))
            found = language_model_loss(self.parts.merge(params), batch, rngs=rngs)
            return found.total / found.count

        with leaky_averages_as(self.form):
            value, grads = jax.value_and_grad(loss)(params)
        grads = clip_by_norm(grads, optax.tree.norm(grads), 1.0)
        updates, opt_state = self._optimizer().update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def _make(self, rngs: nnx.Rngs) -> Any:
        return self.config.build(rngs, PRECISIONS[self.precision])

    def _optimizer(self) -> optax.GradientTransformation:
        config = OptimConfig()
        return adamw(config, lambda count: config.lr, self.parts.layout.map_shapes(decays))


@contextlib.contextmanager
def leaky_averages_as(form: Form) -> Iterator[None]:
    """Let the memories that are traced inside compute leaky averages by this form."""
    if form == "recurrence":
        yield
        return

    def by_matrix(x: jax.Array, rate: jax.Array, **options: Any) -> LeakyOutput:
        if options["segment_ids"] is not None or options["initial_state"] is not None:
            raise ConfigError("The (T, T) form is a baseline for one document from its start.")
        y = baselines.leaky_average_by_matrix(x, rate)
        return LeakyOutput(y, LeakyState(y[:, -1], None))

    with mock.patch("jaxmem.nn.features.leaky_average", by_matrix):
        yield


def full_step(row: Row, models: Mapping[str, DecoderConfig]) -> Step:
    """Build the step of a line at its published size."""
    base = models[row.preset]
    values: dict[str, Any] = {"value_extractor": row.values}
    mixer = dataclasses.replace(base.mixer, **values)
    config = dataclasses.replace(base, mixer=mixer, context_len=row.block, remat=False)
    return Step(config, row.batch, "bfloat16", row.form)


def small_step(row: Row, models: Mapping[str, DecoderConfig]) -> Step:
    """Build a step of a line's shape for a CPU: a quarter of the block, two narrow layers."""
    full = full_step(row, models).config
    heads: dict[str, Any] = {"num_heads": 4}
    stored: Any = full.feed_forward
    config = dataclasses.replace(
        full,
        vocab_size=512,
        context_len=row.block // 4,
        dim=64,
        depth=2,
        mixer=dataclasses.replace(full.mixer, **heads),
        feed_forward=dataclasses.replace(stored, **heads, memory_size=224),
    )
    return Step(config, row.batch, "float32", row.form)


def run_mosaics(models: Mapping[str, DecoderConfig], *, rounds: int) -> result.Result:
    """Measure all lines; without a GPU reduced ones, and predict the memory of the full ones.

    Args:
      models: configs of `PRESETS` by name.
      rounds: rounds of samples.
    """
    on_gpu = jax.default_backend() == "gpu"
    build = full_step if on_gpu else small_step
    cells = []
    for number, row in enumerate(ROWS, 1):
        print(f"[{number}/{len(ROWS)}] {row.preset} {row.block} {row.form}", file=sys.stderr)
        cells.append(_measured(row, build(row, models), small=not on_gpu, rounds=rounds))
    notes: list[str] = [*_NOTES]
    if not on_gpu:
        notes.append("Reduced: on a CPU, two layers of width 64 and a quarter of the block.")
        predicted, note = predict(models)
        cells += predicted
        notes.append(note)
    return result.environment() | {"kind": "memory_mosaics", "cells": cells, "notes": notes}


def predict(models: Mapping[str, DecoderConfig]) -> tuple[list[dict[str, Any]], str]:
    """Return lines with the memory of full-size programs compiled for a GPU, and a remark."""
    if absent := _deviceless.missing():
        return [], f"Memory at full size is not predicted: {absent}."
    cells = []
    for row in ROWS:
        step = full_step(row, models)
        cells.append(_cell(row, step, compiled_peak_bytes(step, STEP_DEVICE), small=False))
    return cells, f"Not run: compiled for {STEP_DEVICE}, bfloat16; memory as the compiler says."


def compiled_peak_bytes(step: Step, device: str) -> int:
    """Compile a training step for a device and return the memory that it needs there."""
    state = jax.eval_shape(step.make_state)
    tokens = step.tokens()
    shape = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
    memory = _deviceless.compile_for(device, step, state, shape).memory_analysis()
    # Where the step runs its state is donated, and so is there once.
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return peak_bytes(memory) - donated


def peak_bytes(memory: Any) -> int:
    """Return the memory of a call: operands and results, shared ones once, and temporaries."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def _measured(row: Row, step: Step, *, small: bool, rounds: int) -> dict[str, Any]:
    state, tokens = step.make_state(), jax.device_put(step.tokens())
    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    update = _keeping(compiled, state, tokens)
    found = timing.time_calls({"step": update}, budget=0.0, rounds=rounds)["step"]
    cell = _cell(row, step, peak_bytes(compiled.memory_analysis()), small=small)
    return cell | {"ms": found.median_ms, "spread": found.spread}


def _keeping(compiled: Any, state: Any, tokens: jax.Array) -> Callable[[], jax.Array]:
    """Return a call without operands that updates a state of its own."""

    def call() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, tokens)
        return loss

    return call


def _cell(row: Row, step: Step, peak: int, *, small: bool) -> dict[str, Any]:
    return {
        "table": row.table,
        "model": f"{row.preset} (reduced)" if small else row.preset,
        "parameters": step.parameters,
        "values": row.values,
        "block": step.config.context_len,
        "batch": row.batch,
        "form": row.form,
        "precision": step.precision,
        "ms": None,
        "spread": None,
        "peak_bytes": peak,
        "published": {"block": row.block, "ms": row.published_ms, "gb": row.published_gb},
    }
