"""Markdown tables: the zoo of mixers, and helpers for the other reports."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxmem.mixers.base import MixerConfig, config_class, mixer_class, names
from jaxmem.nn.init import gpt2_init
from jaxmem.training.config import RunConfig
from jaxmem.training.console import human_bytes

ZOO_DIM = 512
"""Width at which the zoo table states the size of a state."""
ZOO_LENGTHS = (1024, 16384)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def zoo_table(presets: Mapping[str, RunConfig]) -> str:
    """Return the table of all registered mixers: paper, state, forms, parity and presets.

    Args:
      presets: configurations by name; a mixer is shown with those that have it in a slot.
    """
    lengths = " / ".join(f"{length // 1024}k" for length in ZOO_LENGTHS)
    head = ("mixer", "paper", f"state at {lengths} tokens", "forms", "parity", "presets")
    rows = []
    for name in names():
        kind = config_class(name)
        used = [p for p, config in presets.items() if kind in _slots(config)]
        links = ", ".join(f"`{preset}`" for preset in used) or "none"
        config = kind()
        rows.append((f"`{name}`", kind.paper, _state(name), _forms(config), kind.parity, links))
    note = f"State: bytes of one sequence and one layer, float32, width {ZOO_DIM}, default heads."
    return f"{markdown_table(head, rows)}\n\n{note}"


def _slots(config: RunConfig) -> list[type[MixerConfig]]:
    """Return the mixers of a preset's model; a model without slots has none."""
    values = (getattr(config.model, field.name) for field in dataclasses.fields(config.model))
    return [type(value) for value in values if isinstance(value, MixerConfig)]


def _forms(config: MixerConfig) -> str:
    return "parallel, chunked, step" if "forms" in config.supports else "parallel"


def _state(name: str) -> str:
    config = config_class(name)()
    mixer = nnx.eval_shape(
        lambda: mixer_class(name)(config, ZOO_DIM, init=gpt2_init(1), rngs=nnx.Rngs(0))
    )
    sizes = [mixer.state_bytes(1, length) for length in ZOO_LENGTHS]
    if sizes[0] == sizes[-1]:
        return f"{human_bytes(sizes[0])}, constant"
    return " / ".join(map(human_bytes, sizes))
