"""Rotary positions: queries and keys turned by angles whose difference is the distance in time."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxmem.errors import ConfigError, ShapeError, unknown_name
from jaxmem.ops.checks import as_arrays, check_floating
from jaxmem.ops.norms import at_least_float32
from jaxmem.shapes import Queries, SegmentIds

RopeLayout = Literal["half", "pairs"]
"""Which channels turn together: i and K/2 + i (Llama), or 2i and 2i + 1 (RoFormer)."""
PositionDType = Literal["float32", "bfloat16"]


def rope(
    x: Queries,
    positions: Int[Array, "T"] | SegmentIds,
    *,
    layout: RopeLayout,
    theta: float = 10000.0,
    position_dtype: PositionDType = "float32",
) -> Queries:
    r"""Turn channel pairs (a, b) of each head by an angle proportional to the token's position.

    (a, b) <- (a cos φ - b sin φ, a sin φ + b cos φ),  φ = position · θ^{-2i/K} for pair i < K/2

    The product of a turned query and a turned key depends only on the difference of their
    positions. The two layouts are the same function up to the order of the channels, so weights of
    one are not those of the other. Angles are float32, also for half precision (float64 for
    float64).

    Args:
      x: queries or keys, K even.
      positions: of the tokens, in tokens; alike for all rows, or [B T].
      layout: which channels form pair i: `half`, i and K/2 + i; `pairs`, 2i and 2i + 1.
      theta: θ, > 0; the longest wavelength is 2π θ^{1-2/K} tokens.
      position_dtype: what positions are rounded to. `bfloat16` is for comparison only: it repeats
        the softmax baseline of 2Mamba, trained with positions that are 2 apart above 256, 4 above
        512, and so on, so that of 2048 tokens only 641 have a position of their own.

    Returns:
      The turned x, in its dtype.

    Raises:
      ShapeError: K is odd, or the positions do not fit x.
      ConfigError: theta is not positive.
      DTypeError: x is not floating point.
      UnknownName: no such layout or dtype of positions.

    Reference: Su et al. 2021 (arXiv 2104.09864), eq. 34; Llama 2 `rotate_half` (`half`).
    """
    x, positions = as_arrays(x, positions)
    _check(x, positions, layout, theta, position_dtype)
    wide = at_least_float32(x)
    half = x.shape[-1] // 2
    # In float64 first: at position 8192 a rounding of the rate is that many times as large.
    rates = np.asarray(theta ** (-np.arange(half) / half), wide.dtype)
    places = positions.astype(position_dtype).astype(wide.dtype)
    angles = places[..., None, None] * rates  # [T 1 K/2] or [B T 1 K/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if layout == "half":
        a, b = wide[..., :half], wide[..., half:]
    else:
        a, b = wide[..., ::2], wide[..., 1::2]
    turned = (a * cos - b * sin, a * sin + b * cos)
    if layout == "half":
        y = jnp.concatenate(turned, axis=-1)
    else:
        y = jnp.stack(turned, axis=-1).reshape(x.shape)
    return y.astype(x.dtype)


def _check(x: Array, positions: Array, layout: str, theta: float, position_dtype: str) -> None:
    check_floating("rope", x=x)
    if layout not in get_args(RopeLayout):
        raise unknown_name("rope layout", layout, get_args(RopeLayout))
    if position_dtype not in get_args(PositionDType):
        raise unknown_name("rope position_dtype", position_dtype, get_args(PositionDType))
    if not theta > 0:
        raise ConfigError(f"rope: theta={theta} is not positive. Use 10000.")
    if x.shape[-1] % 2:
        raise ShapeError(
            f"rope: x {x.shape} has {x.shape[-1]} channels per head, which cannot be turned in "
            "pairs. Use an even head_dim, or no rope."
        )
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ShapeError(
            f"rope: positions have shape {positions.shape}. Pass one per token, shape "
            f"{x.shape[1:2]} or {x.shape[:2]}."
        )
