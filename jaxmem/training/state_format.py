"""The train state as the named arrays of a checkpoint, whatever its layout in memory."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.parallel.rules import leaf_spec
from jaxmem.training.layout import Layout
from jaxmem.training.state import TrainState, state_shardings


class StateFormat:
    """Converts between the train state and the named arrays on disk, on the current mesh."""

    def __init__(self, abstract: TrainState, layout: Layout, mesh: Mesh):
        self._abstract = abstract
        self._layout = layout
        self._mesh = mesh

    @cached_property
    def pack(self) -> Callable[[TrainState], dict[str, dict[str, jax.Array]]]:
        """State -> items of named arrays."""
        return jax.jit(self._pack, out_shardings=self._shardings)

    @cached_property
    def unpack(self) -> Callable[[dict[str, dict[str, jax.Array]]], TrainState]:
        """Items of named arrays -> state."""
        shardings = state_shardings(self._abstract, self._layout, self._mesh)
        return jax.jit(self._unpack, out_shardings=shardings)

    def targets(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return what to restore: shapes, types, and the placement on the current mesh."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._pack, self._abstract),
            self._shardings,
        )

    def _pack(self, state: TrainState) -> dict[str, dict[str, jax.Array]]:
        layout = self._layout
        loop = state._replace(params=None, opt_state=None)
        return {
            "params": layout.unstack(state.params),
            "opt_state": named_leaves(
                layout.map_params(layout.unstack, state.opt_state, layout.groups)
            ),
            "loop": named_leaves(loop),
        }

    def _unpack(self, items: dict[str, dict[str, jax.Array]]) -> TrainState:
        layout = self._layout
        opt_state = self._abstract.opt_state
        single = jax.eval_shape(
            lambda tree: layout.map_params(layout.unstack, tree, layout.groups), opt_state
        )
        loop = self._abstract._replace(params=None, opt_state=None)
        state = from_named(loop, items["loop"])
        opt_state = from_named(single, items["opt_state"])
        return state._replace(
            params=layout.stack(items["params"]),
            opt_state=layout.map_params(layout.stack, opt_state, layout.shapes),
        )

    @cached_property
    def _shardings(self) -> dict[str, dict[str, NamedSharding]]:
        items = jax.eval_shape(self._pack, self._abstract)
        fsdp = self._mesh.shape["fsdp"]

        def place(item: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            spec = PartitionSpec() if item == "loop" else leaf_spec(leaf.shape, fsdp)
            return NamedSharding(self._mesh, spec)

        return {
            item: {name: place(item, leaf) for name, leaf in leaves.items()}
            for item, leaves in items.items()
        }


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def from_named(template: Any, leaves: Mapping[str, Any]) -> Any:
    """Build a pytree like the template from leaves by dotted name."""
    return jax.tree.unflatten(
        jax.tree.structure(template), [leaves[name] for name in named_leaves(template)]
    )
