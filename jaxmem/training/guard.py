"""Stops a run whose loss or gradient is no longer finite, and says where that began.

The step itself refuses to apply such an update and freezes the state. The host reads the flag of
one update after it has dispatched the next one, so that looking does not make the device wait.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.errors import NonFiniteLoss
from jaxmem.training.feed import Batch
from jaxmem.training.layout import Params
from jaxmem.training.state import NEVER, TrainState
from jaxmem.training.step import Report, Steps, step_key


class _Seen(NamedTuple):
    report: Report
    batch: Batch


class NonFiniteGuard:
    """Keeps the last updates' batches until their flags were read."""

    def __init__(self, steps: Steps):
        self._steps = steps
        self._waiting: list[_Seen] = []

    def add(self, report: Report, batch: Batch) -> None:
        """Take the report of an update just dispatched."""
        self._waiting.append(_Seen(report, batch))

    def check(self, state: TrainState, *, wait: bool) -> None:
        """Read the flags of all updates but the newest, or of all.

        Args:
          state: the newest state; frozen at the last good update if one was bad.
          wait: also read the newest update's flag, which waits for the device.

        Raises:
          NonFiniteLoss: an update was not finite.
        """
        ready = len(self._waiting) if wait else len(self._waiting) - 1
        for seen in self._waiting[: max(ready, 0)]:
            if int(seen.report.first_bad_step) != NEVER:
                raise self._explain(state, seen)
        del self._waiting[: max(ready, 0)]

    def _explain(self, state: TrainState, seen: _Seen) -> NonFiniteLoss:
        def finite(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
            grads, _ = self._steps.gradient()(state.params, batch, step_key(state))
            single: Params = self._steps.parts.layout.unstack(grads)
            return {name: jnp.all(jnp.isfinite(g)) for name, g in single.items()}

        # The state is what the bad update started from: recomputing gives the same gradient.
        flags = jax.device_get(jax.jit(finite)(state, seen.batch))
        bad = [name for name in self._steps.parts.layout.shapes if not flags[name]]
        loss, norm = float(seen.report.loss), float(seen.report.grad_norm)
        where = (
            f"the first gradient that is not finite is {bad[0]}" if bad else "no single gradient"
        )
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        name, rows = next(iter(seen.batch.items()))
        row = np.asarray(rows.addressable_shards[0].data)[0].ravel()[:16]
        begins = " ".join(f"{x:g}" for x in row)
        return NonFiniteLoss(
            f"Update {int(seen.report.first_bad_step)} is not finite: loss {loss:g}, gradient norm "
            f"{norm:g}; {where}{more}. Its batch begins with {name} {begins}. The update was not "
            "applied and nothing after the last good checkpoint was saved. Lower `optim.lr` or "
            "`optim.clip_norm`, or lengthen `optim.warmup_steps`."
        )
