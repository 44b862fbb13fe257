"""What several ops check when they are called, so that a mistake has the same message in each."""

import math
import numbers
from typing import Any, get_args

import jax.numpy as jnp

from jaxmem.errors import ConfigError, DTypeError, ShapeError, unknown_name
from jaxmem.ops.attention_terms import Dropout
from pallas_kernels._compat import Precision

FLOATING = ("float16", "bfloat16", "float32", "float64")


def check_floating(op: str, **arrays: Any) -> None:
    """Check that arrays hold real numbers that products and sums can be trusted with.

    Args:
      op: name of the op (or module) that was called, for the message.
      arrays: its arguments by name; None and Python numbers pass.

    Raises:
      DTypeError: one holds integers, truth values, complex or 8-bit numbers.
    """
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", None)
        if dtype is not None and str(dtype) not in FLOATING:
            raise DTypeError(
                f"{op}: {name} is {dtype}, where {', '.join(FLOATING)} are expected. "
                "Cast it to float32 or bfloat16."
            )


def check_axes(op: str, name: str, array: Any, axes: str) -> None:
    """Check that an array has the named axes, such as `B T D`, and that none is empty.

    Raises:
      ShapeError: it has another number of axes, or nothing in it.
    """
    if len(array.shape) != len(axes.split()):
        raise ShapeError(f"{op}: {name} has shape {array.shape}. Pass {name} [{axes}].")
    if 0 in array.shape:
        raise ShapeError(
            f"{op}: an axis of {name} {array.shape} is empty. Give at least one entry along each "
            f"of [{axes}]."
        )


def check_shape(op: str, name: str, array: Any, expected: tuple[int, ...], what: str) -> None:
    """Check that an argument has the one shape that fits the others; None passes.

    Raises:
      ShapeError: it has another; the message asks for `what`.
    """
    if array is not None and array.shape != expected:
        raise ShapeError(f"{op}: {name} has shape {array.shape}. Pass {what}, shape {expected}.")


def check_documents(
    op: str, tokens: tuple[int, ...], segment_ids: Any, initial_segment: Any = None
) -> None:
    """Check the documents of packed rows against the axes [B T] of their tokens.

    Raises:
      ShapeError: `segment_ids` is not [B T], or `initial_segment` not [B].
    """
    check_shape(op, "segment_ids", segment_ids, tokens, "the document of each token")
    check_shape(op, "initial_segment", initial_segment, tokens[:1], "one document per row")


def check_scale(op: str, scale: Any, heads: int) -> None:
    """Check a factor of logits, which is one number or one per head.

    Raises:
      ShapeError: it is neither.
    """
    if jnp.shape(scale) not in ((), (heads,)):
        raise ShapeError(
            f"{op}: scale has shape {jnp.shape(scale)}. "
            f"Pass one number, or one per head, shape ({heads},)."
        )


def check_precision(precision: Precision | None) -> None:
    """Check the name of a precision.

    Raises:
      UnknownName: there is no such precision.
    """
    if precision is not None and precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))


def check_clamp(op: str, clamp: Any) -> None:
    """Check a largest logit; None is none.

    Raises:
      ConfigError: it is not a finite number.
    """
    if clamp is None or (isinstance(clamp, numbers.Real) and math.isfinite(clamp)):
        return
    raise ConfigError(
        f"{op}: clamp={clamp} is not a finite number, the largest logit. "
        "Use 5.0, say, or clamp=None for none."
    )


def active_dropout(op: str, dropout: Dropout | None) -> Dropout | None:
    """Return a dropout that drops anything, or None.

    Raises:
      ConfigError: its rate is not in [0, 1).
    """
    if dropout is None:
        return None
    if not 0.0 <= dropout.rate < 1.0:
        raise ConfigError(
            f"{op}: dropout.rate={dropout.rate} is not in [0, 1), the share of weights to drop. "
            "Use 0.1, say, or dropout=None for none."
        )
    return dropout if dropout.rate else None
