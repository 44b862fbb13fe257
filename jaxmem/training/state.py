"""The train state: everything that decides how a run goes on, as one pytree of arrays."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.training.layout import Layout, ModelParts, Params, init_params

NEVER = -1
"""`first_bad_step` as long as every update was finite."""


Sum = jax.Array | np.ndarray
"""A number of an interval: on the device while updates add to it, else on the host."""


class Interval(NamedTuple):
    """Sums over the updates since the last row of metrics; kept on the device, and in checkpoints.

    A run resumed between two rows therefore writes the same next row as one that never stopped.
    """

    loss: Sum
    """Sum of the cross-entropy, float32."""
    tokens: Sum
    """Scored tokens, int32."""
    grad_norm: Sum
    """Global gradient norm before clipping at the last update, float32."""
    aux: dict[str, Sum]
    """The model's aux entries times scored tokens, summed, float32."""


class TrainState(NamedTuple):
    """What an update reads and writes."""

    params: Params
    """Float32, laid out as `jaxmem.training.layout` says."""
    opt_state: optax.OptState
    step: jax.Array
    """Updates done, int32."""
    key: jax.Array
    """Key data of the dropout stream; never changes, the step is folded in."""
    interval: Interval
    first_bad_step: jax.Array
    """The update that was not finite and was not applied, else NEVER; then nothing changes."""


def stream_seed(seed: int, stream: str) -> int:
    """Derive the seed of a named stream (`init`, `data`, `dropout`, `eval`) from `run.seed`."""
    return zlib.crc32(f"{seed}/{stream}".encode())


def stream_key(seed: int, stream: str) -> jax.Array:
    """Derive the random key of a named stream from `run.seed`."""
    return jax.random.key(stream_seed(seed, stream))


def empty_interval(aux_names: list[str]) -> Interval:
    """Return the interval of no updates, on the host."""
    zero = np.zeros((), np.float32)
    return Interval(zero, np.zeros((), np.int32), zero, dict.fromkeys(aux_names, zero))


def state_shardings(state: TrainState, layout: Layout, mesh: Mesh) -> TrainState:
    """Return the placement of a state (or of its abstract form), leaf by leaf."""
    fsdp = mesh.shape["fsdp"]
    whole = NamedSharding(mesh, PartitionSpec())

    def of_params(params: Params) -> dict[str, NamedSharding]:
        specs = layout.specs(fsdp)
        return {name: NamedSharding(mesh, specs[name]) for name in params}

    sharded = layout.map_params(of_params, state, layout.groups)
    return jax.tree.map(lambda x: x if isinstance(x, NamedSharding) else whole, sharded)


class StateInit:
    """Makes the state before the first update, placed on the mesh."""

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        parts: ModelParts,
        optimizer: optax.GradientTransformation,
        aux_names: list[str],
        mesh: Mesh,
    ):
        """Describe the state; nothing is allocated yet.

        Args:
          make: builds the model from its random streams.
          parts: the same model taken apart.
          optimizer: gives the optimiser's part of the state.
          aux_names: the model's aux entries, which the interval sums.
          mesh: where the state lives.
        """

        def build(params_key: jax.Array, dropout_key: jax.Array) -> TrainState:
            params = init_params(make, parts, params_key)
            return TrainState(
                params=params,
                opt_state=optimizer.init(params),
                step=jnp.zeros((), jnp.int32),
                key=jax.random.key_data(dropout_key),
                interval=jax.tree.map(jnp.asarray, empty_interval(aux_names)),
                first_bad_step=jnp.full((), NEVER, jnp.int32),
            )

        key = jax.eval_shape(lambda: jax.random.key(0))
        plain = jax.eval_shape(build, key, key)
        self.shardings = state_shardings(plain, parts.layout, mesh)
        self.abstract: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            plain,
            self.shardings,
        )
        self._build = jax.jit(build, out_shardings=self.shardings)

    def __call__(self, seed: int) -> TrainState:
        """Return the state of a run with this seed before its first update."""
        return self._build(stream_key(seed, "init"), stream_key(seed, "dropout"))
