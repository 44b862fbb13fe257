"""The head of a run's log: one screen that says what will happen."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

import jaxmem
from jaxmem.backbones.base import Recurrent
from jaxmem.ops.dispatch import Choice
from jaxmem.parallel.mesh import describe_mesh
from jaxmem.parallel.rules import describe_shardings
from jaxmem.training.config import RunConfig, diff
from jaxmem.training.console import human_bytes
from jaxmem.training.folder import git_revision
from jaxmem.training.layout import ModelParts, Params
from jaxmem.training.optim import decay_groups


def overrides(config: RunConfig, preset: RunConfig | None) -> list[str]:
    """Say what differs from the preset."""
    changes = [] if preset is None else diff(preset, config)
    text = ", ".join(f"{path}={new}" for path, _, new in changes)
    return [f"overrides  {text or 'none'}"]


def head(config: RunConfig, preset: RunConfig | None, mesh: Mesh, parts: ModelParts) -> list[str]:
    """Return the lines that are known before the step is compiled."""
    revision = git_revision()
    shapes = {name: leaf.shape for name, leaf in parts.layout.shapes.items()}
    groups = decay_groups(shapes, config.optim)
    total = sum(group.count for group in groups)
    lines = [
        f"jaxmem {jaxmem.__version__}{f' ({revision})' if revision else ''}, jax {jax.__version__}",
        f"run        {config.run.name or config.run.folder.name}, seed {config.run.seed}, "
        f"{config.run.steps} updates, {config.run.precision}",
        *overrides(config, preset),
        f"devices    {describe_mesh(mesh)}",
        f"parameters {total:,} in {len(shapes)} arrays",
    ]
    lines += [
        f"  decay {decay:g}: {count:,} in {len(names)} arrays ({_some(names)})"
        for decay, names, count in groups
        if names
    ]
    if mesh.size > 1:
        stacked = parts.layout.stacked_shapes
        specs = parts.layout.specs(mesh.shape["fsdp"])
        lines += [f"  {line}" for line in describe_shardings(stacked, specs, mesh)]
    state = jax.eval_shape(lambda single: _state(parts, single), dict(parts.layout.shapes))
    if state is not None:
        size = human_bytes(_size(state))
        lines.append(f"state      {size} per sequence of {config.model.context_len}")
    return lines


def _state(parts: ModelParts, single: Params) -> list[jax.Array] | None:
    """Return the arrays of one sequence's state; None for a model that has none."""
    model = parts.merge_single(single)
    return jax.tree.leaves(model.init_state(1)) if isinstance(model, Recurrent) else None


def compiled_lines(compiled: Any, choices: Sequence[Choice]) -> list[str]:
    """Return what the compiled step will use, as far as the backend tells.

    Args:
      compiled: the step.
      choices: what its ops chose while it was traced.
    """
    lines = []
    memory = compiled.memory_analysis()
    if memory is not None:
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        lines.append(
            f"memory     {human_bytes(held)} parameters, optimiser and batch + "
            f"{human_bytes(temporary)} temporary, per device"
        )
    cost = compiled.cost_analysis() or {}
    if flops := cost.get("flops"):
        lines.append(f"compute    {flops:.3g} FLOP per update and device")
    lines += [f"op         {c.op}: {c.implementation} ({c.reason})" for c in choices]
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
