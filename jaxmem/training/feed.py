"""Batches on their way from the data iterator to the devices, one ahead of the step that runs."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmem.parallel.mesh import batch_sharding
from jaxmem.tasks.base import Batches

Batch = dict[str, jax.Array]


class Place:
    """Puts this process's rows of a batch onto its devices."""

    def __init__(self, mesh: Mesh):
        self._sharding = batch_sharding(mesh)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Return the global batch, rows over the batch axes of the mesh."""
        return {
            name: jax.make_array_from_process_local_data(self._sharding, rows)
            for name, rows in batch.items()
        }


class Feed:
    """Hands out placed batches and knows the position of the first one not handed out."""

    def __init__(self, iterator: Batches, place: Place):
        """Wrap the iterator of a task."""
        self._iterator = iterator
        self._place = place
        self._pending: Batch | None = None
        self.position = iterator.get_state()

    def restore(self, position: Any, batches: int) -> None:
        """Go on from a saved position, or count batches off where there is none to use.

        Args:
          position: of the iterator; None if another number of processes saved it.
          batches: how many were used before, by all processes alike.
        """
        if position is not None:
            self._iterator.set_state(position)
        else:
            for _ in range(batches):
                next(self._iterator)
        self._pending = None
        self.position = self._iterator.get_state()

    def prefetch(self) -> None:
        """Fetch and place the next batch, while the devices are busy with the last one."""
        if self._pending is None:
            self.position = self._iterator.get_state()
            self._pending = self._place(next(self._iterator))

    def peek(self) -> Batch:
        """Return the next batch without using it up."""
        self.prefetch()
        return cast(Batch, self._pending)

    def take(self) -> Batch:
        """Return the next batch; the position then is behind it."""
        batch = self.peek()
        self._pending = None
        self.position = self._iterator.get_state()
        return batch


class EvalSet:
    """The same few batches at every evaluation; kept on the host once they were drawn."""

    def __init__(self, batches: Batches, count: int, place: Place):
        self._source: Batches | None = batches
        self._count = count
        self._place = place
        self._kept: list[dict[str, np.ndarray]] = []

    def __iter__(self) -> Iterator[Batch]:
        if self._source is not None:
            self._kept = [dict(next(self._source)) for _ in range(self._count)]
            self._source = None
        return (self._place(batch) for batch in self._kept)
