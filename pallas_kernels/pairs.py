"""What kernels over pairs of queries and keys share: decays, launch configurations, and needs."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _launch

FAR = 2**30
"""Further than any place, of which all are below; twice of it still fits int32."""


class Places(NamedTuple):
    """Where queries and keys stand, when that is not simply their index in one row.

    Integers; places are from 0 to 2^30 - 1.
    """

    query: Any  # [B T]
    key: Any  # [B S]
    query_segment: Any  # [B T]
    key_segment: Any  # [B S]
    """Document of each key; 0 is padding or an unused cache slot and is never visible."""


class Decay(NamedTuple):
    """Cumulative log forget gates in two float32 words, the first multiples of a power of two."""

    query: Any  # [B H T]
    query_rest: Any  # [B H T]
    key: Any  # [B H S]
    key_rest: Any  # [B H S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTiles:
    """Tiles of a forward kernel and of the two backward kernels."""

    block_q: int
    """Queries that a program of the forward kernel owns."""
    block_k: int
    """Keys per step of the forward kernel."""
    num_warps: int
    """Warps of a program of the forward kernel."""
    num_stages: int
    """Loads in flight in the loop of the forward kernel."""
    backward_q: int
    """Queries per tile of the backward kernels."""
    backward_k: int
    """Keys per tile of the backward kernels."""
    backward_warps: int
    """Warps of a program of the backward kernels."""
    backward_stages: int
    """Loads in flight in the loops of the backward kernels."""


class PairKernel(NamedTuple):
    """Kernels over pairs of queries and keys: where their tables are, and what they cannot take."""

    name: str
    """Of the tables."""
    shared_bytes: Callable[[PairTiles, int, int, Any, Any], int]
    """Shared memory of the hungriest kernel, of (tiles, width, value width, dtype, value dtype)."""

    def find_config(
        self, dtype: Any, width: int, value_width: int, *, length: int, rows: int
    ) -> PairTiles:
        """Look up the configuration of a call with this many keys, and rows times heads.

        Raises:
          LookupError: no entry fits the dtype and the widths; `unmet` says so before.
        """
        widest, dtype = max(width, value_width), jnp.dtype(dtype).name
        return _launch.lookup(self.name, PairTiles, dtype, widest, length, rows)

    def unmet(
        self,
        dtype: Any,
        value_dtype: Any,
        width: int,
        value_width: int,
        *,
        length: int,
        rows: int,
        config: PairTiles | None = None,
    ) -> str | None:
        """Say why the kernels cannot take a call, or None; `dtype` is that of queries and keys."""
        for each in (dtype, value_dtype):
            why = _launch.unmet(each, width, value_width)
            if why:
                return why
        try:
            config = config or self.find_config(dtype, width, value_width, length=length, rows=rows)
        except LookupError as error:
            return str(error).rstrip(".")
        odd = _launch.not_power_of_two(config, "block_q", "block_k", "backward_q", "backward_k")
        if odd:
            return odd
        needed = self.shared_bytes(config, width, value_width, dtype, value_dtype)
        return _launch.too_much_shared(self.name, needed)
