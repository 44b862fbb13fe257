"""What several ops check when they are called, so that a mistake has the same message in each."""

import math
import numbers
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.errors import ConfigError, DTypeError, ShapeError, unknown_name
from jaxmem.ops.attention_terms import Dropout
from pallas_kernels._compat import Precision

FLOATING = ("float16", "bfloat16", "float32", "float64")
_MAY_BE_EMPTY = ("B", "T", "S")


def as_arrays(*values: Any) -> tuple[Any, ...]:
    """Return NumPy arrays as JAX's, in the dtypes that JAX gives them; anything else as it is.

    With 64-bit types off, float64 arrays of NumPy would else warn wherever they are cast.
    """
    return tuple(
        jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, value)
        for value in values
    )


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
    """Check that an array has the named axes, such as `B T D`.

    Rows (B), queries (T) and keys (S) may be none at all; the result is then empty or zero.

    Raises:
      ShapeError: it has another number of axes, or an axis of another name is empty.
    """
    if len(array.shape) != len(axes.split()):
        raise ShapeError(f"{op}: {name} has shape {array.shape}. Pass {name} [{axes}].")
    sizes = zip(axes.split(), array.shape, strict=True)
    if any(isinstance(n, int) and n == 0 and axis not in _MAY_BE_EMPTY for axis, n in sizes):
        raise ShapeError(
            f"{op}: an axis of {name} {array.shape} is empty. Give at least one entry along each "
            f"of [{axes}] but rows and tokens."
        )


def is_empty(array: Any) -> bool:
    """Return whether an array has an axis without any entry; symbolic sizes count as some."""
    return any(isinstance(size, int) and size == 0 for size in array.shape)


def check_shape(op: str, name: str, array: Any, expected: tuple[Any, ...], what: str) -> None:
    """Check that an argument has the one shape that fits the others; None passes.

    Raises:
      ShapeError: it has another; the message asks for `what`.
    """
    if array is not None and array.shape != expected:
        raise ShapeError(f"{op}: {name} has shape {array.shape}. Pass {what}, shape {expected}.")


def check_documents(
    op: str, tokens: tuple[Any, ...], segment_ids: Any, initial_segment: Any = None
) -> None:
    """Check the documents of packed rows against the axes [B T] of their tokens.

    Raises:
      ShapeError: `segment_ids` is not [B T], or `initial_segment` not [B].
      DTypeError: one of them does not hold integers.
    """
    check_shape(op, "segment_ids", segment_ids, tokens, "the document of each token")
    check_shape(op, "initial_segment", initial_segment, tokens[:1], "one document per row")
    check_integers(op, segment_ids=segment_ids, initial_segment=initial_segment)


def check_integers(op: str, **arrays: Any) -> None:
    """Check that arrays hold integers, of which numbers of documents and places are.

    Raises:
      DTypeError: one holds something else.
    """
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise DTypeError(
                f"{op}: {name} is {array.dtype}, where integers are expected. Cast it to int32."
            )


def logit_scale(op: str, scale: Any, heads: int, width: int) -> Any:
    """Return the factor of logits: one number, or one per head; None is 1/sqrt(K).

    A Python or NumPy number comes back as a Python float, which some implementations need.

    Raises:
      ShapeError: it has another shape.
      DTypeError: it is an array that is not floating point.
      ConfigError: it is a number that is not finite.
    """
    if scale is None or isinstance(scale, numbers.Real):
        return number_scale(op, scale, width)
    check_floating(op, scale=scale)
    if jnp.shape(scale) not in ((), (heads,)):
        raise ShapeError(
            f"{op}: scale has shape {jnp.shape(scale)}. "
            f"Pass one number, or one per head, shape ({heads},)."
        )
    return scale


def number_scale(op: str, scale: Any, width: int) -> float:
    """Return a factor that is one number, as a Python float; None is 1/sqrt(K).

    Raises:
      ConfigError: it is not a finite Python or NumPy number.
    """
    if scale is None:
        return float(width) ** -0.5
    if isinstance(scale, numbers.Real) and math.isfinite(scale):
        return float(scale)
    raise ConfigError(
        f"{op}: scale={scale!r} is not a finite number. Use 0.125, say, or None for 1/sqrt(K)."
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
