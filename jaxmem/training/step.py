"""The training and evaluation steps: pure functions of arrays, one program on any mesh.

The loss and its gradient run under `jax.shard_map`: each device takes its rows of the batch,
gathers the parameters that `fsdp` splits, and differentiates with respect to its own shard, so the
transpose of the gather reduces and scatters the gradient. Kernels inside see plain local arrays.
The optimiser runs outside it, on the sharded arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxmem.parallel.mesh import BATCH_AXES, BATCH_SPEC
from jaxmem.parallel.rules import split_axis
from jaxmem.tasks.base import LOSS_PREFIX, TaskLoss
from jaxmem.training.layout import ModelParts, Params
from jaxmem.training.optim import clip_by_norm
from jaxmem.training.state import NEVER, Interval, TrainState

Batch = dict[str, Any]
LossFn = Callable[..., TaskLoss]


class Sums(NamedTuple):
    """Sums over scored items; those of parts of a batch add up to those of the batch."""

    loss: jax.Array
    tokens: jax.Array
    """Number of scored items, whatever the task calls them."""
    aux: dict[str, jax.Array]


class Report(NamedTuple):
    """What the host may read after an update."""

    loss: jax.Array
    """Mean loss of this update's batch, without the model's own `loss_*`."""
    grad_norm: jax.Array
    first_bad_step: jax.Array


class Steps:
    """Builds the jitted functions of a run from the model's parts, the loss and the mesh."""

    def __init__(self, parts: ModelParts, loss_fn: LossFn, mesh: Mesh, *, accumulate: int = 1):
        self.parts = parts
        self.loss_fn = loss_fn
        self.mesh = mesh
        self.accumulate = accumulate
        self.specs = parts.layout.specs(mesh.shape["fsdp"])
        # Collectives over an axis of one device would be left in the program by some backends.
        self.batch_axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)

    def aux_names(self, batch: Mapping[str, Any]) -> list[str]:
        """Return the names of the model's aux entries, by tracing the loss abstractly."""
        shapes = self.parts.layout.shapes

        def aux(single: Params, batch: Batch) -> dict[str, jax.Array]:
            return self.loss_fn(self.parts.merge_single(single), batch).aux

        return sorted(jax.eval_shape(aux, dict(shapes), dict(batch)))

    def gradient(self) -> Callable[[Params, Batch, jax.Array], tuple[Params, Sums]]:
        """Return (params, batch, key) -> gradient of the mean loss and the batch's sums."""
        return self._shard_map(
            self._local_gradient,
            in_specs=(self.specs, BATCH_SPEC, PartitionSpec()),
            out_specs=(self.specs, PartitionSpec()),
        )

    def update(
        self, optimizer: optax.GradientTransformation, clip_norm: float
    ) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
        """Return one update of the train state; an update that is not finite changes nothing."""
        gradient = self.gradient()

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Report]:
            grads, sums = gradient(state.params, batch, step_key(state))
            norm = optax.tree.norm(grads)
            loss = sums.loss / jnp.maximum(sums.tokens, 1)
            total = loss + _aux_loss(sums) / jnp.maximum(sums.tokens, 1)
            good = jnp.isfinite(total) & jnp.isfinite(norm)
            first_bad = jnp.where(
                (state.first_bad_step == NEVER) & ~good, state.step, state.first_bad_step
            )
            updates, opt_state = optimizer.update(
                clip_by_norm(grads, norm, clip_norm), state.opt_state, state.params
            )
            new = state._replace(
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                step=state.step + 1,
                interval=_add(state.interval, sums, norm),
            )
            apply = first_bad == NEVER
            kept = jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, state)
            return kept._replace(first_bad_step=first_bad), Report(loss, norm, first_bad)

        return step

    def evaluate(self) -> Callable[[Params, Batch], Sums]:
        """Return (params, batch) -> the batch's sums, without dropout."""

        def local(shards: Params, batch: Batch) -> Sums:
            out = self.loss_fn(self.parts.merge(self._gather(shards)), batch)
            return self._psum(_sums(out), self.batch_axes)

        return jax.jit(
            self._shard_map(local, in_specs=(self.specs, BATCH_SPEC), out_specs=PartitionSpec())
        )

    def _shard_map(self, fn: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Any:
        # check_vma=False because Pallas kernels inside cannot be checked; the psums are by hand.
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _psum(self, tree: Any, axes: tuple[str, ...]) -> Any:
        return lax.psum(tree, axes) if axes else tree

    def _gather(self, shards: Params) -> Params:
        def whole(name: str) -> jax.Array:
            axis = split_axis(self.specs[name])
            if axis is None:
                return shards[name]
            return lax.all_gather(shards[name], "fsdp", axis=axis, tiled=True)

        return {name: whole(name) for name in shards}

    def _local_gradient(self, shards: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        """Compute this device's share of the gradient, micro-batch by micro-batch."""
        shard = sum(
            lax.axis_index(axis) * (self.mesh.shape["fsdp"] if axis == "data" else 1)
            for axis in BATCH_AXES
        )
        key = jax.random.fold_in(key, shard)
        micro = jax.tree.map(
            lambda x: x.reshape(self.accumulate, x.shape[0] // self.accumulate, *x.shape[1:]),
            batch,
        )

        def loss(shards: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
            model = self.parts.merge(self._gather(shards))
            sums = _sums(self.loss_fn(model, part, rngs=nnx.Rngs(dropout=key)))
            return sums.loss + _aux_loss(sums), sums

        def add_part(
            carry: tuple[Params, Sums], item: tuple[jax.Array, Batch]
        ) -> tuple[tuple[Params, Sums], None]:
            index, part = item
            value = jax.grad(loss, has_aux=True)(shards, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, value), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(lambda: jax.grad(loss, has_aux=True)(shards, first, key)),
        )
        items = (jnp.arange(self.accumulate), micro)
        (grads, sums), _ = lax.scan(add_part, zeros, items, unroll=self.accumulate == 1)
        sums = self._psum(sums, self.batch_axes)
        # Only the count over all devices and micro-batches makes sums a mean: dividing each part by
        # its own count would weight the items of short parts more.
        count = jnp.maximum(sums.tokens, 1)
        return jax.tree.map(lambda g: g / count, self._reduce(grads)), sums

    def _reduce(self, grads: Params) -> Params:
        """Sum gradients over the batch axes; a split one was summed over `fsdp` by its gather."""
        whole = {name: g for name, g in grads.items() if split_axis(self.specs[name]) is None}
        split = {name: g for name, g in grads.items() if name not in whole}
        rest = tuple(axis for axis in self.batch_axes if axis != "fsdp")
        return self._psum(whole, self.batch_axes) | self._psum(split, rest)


def step_key(state: TrainState) -> jax.Array:
    """Return the random key of the state's next update."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def _sums(out: TaskLoss) -> Sums:
    return Sums(out.total, out.count, {name: mean * out.count for name, mean in out.aux.items()})


def _aux_loss(sums: Sums) -> jax.Array | int:
    return sum(value for name, value in sums.aux.items() if name.startswith(LOSS_PREFIX))


def _add(interval: Interval, sums: Sums, norm: jax.Array) -> Interval:
    return Interval(
        loss=interval.loss + sums.loss,
        tokens=interval.tokens + sums.tokens,
        grad_norm=norm,
        aux=jax.tree.map(jnp.add, interval.aux, sums.aux),
    )
