"""What attention checks when it is called."""

from typing import Any

from jax import Array

from jaxmem.errors import ConfigError, ShapeError
from jaxmem.ops.checks import (
    check_axes,
    check_documents,
    check_floating,
    check_integers,
    check_shape,
)
from pallas_kernels.pairs import Places


def check_operands(q: Array, k: Array, v: Array, **numbers: Any) -> None:
    """Check queries, keys and values, and `numbers`: scale, log_forget and value_gate.

    Raises:
      ShapeError: they do not fit together.
      DTypeError: one of them is not floating point.
    """
    op = "attention"
    check_floating(op, q=q, k=k, v=v, **numbers)
    check_axes(op, "q", q, "B T H K")
    check_axes(op, "k", k, "B S G K")
    check_axes(op, "v", v, "B S G V")
    heads = q.shape[2]
    if (
        (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
        or k.shape[:3] != v.shape[:3]
        or heads % k.shape[2]
    ):
        raise ShapeError(
            f"{op}: q {q.shape}, k {k.shape}, v {v.shape} do not fit together. "
            "Expected q [B T H K], k [B S G K], v [B S G V] with H a multiple of G."
        )
    for name in ("log_forget", "value_gate"):
        expected = (*k.shape[:2], heads)
        check_shape(op, name, numbers[name], expected, "one gate per key and query head")


def check_order(causal: bool, lag: int, window: int | None, log_forget: Array | None) -> None:
    """Check which distances are visible.

    Raises:
      ShapeError: none is.
      ConfigError: distances count with `causal=False`.
    """
    if lag < 0 or (window is not None and window <= lag):
        raise ShapeError(
            f"attention: with lag={lag} and window={window} the first visible key is not behind "
            "the last. Use 0 <= lag < window."
        )
    if not causal and (lag or window is not None or log_forget is not None):
        raise ConfigError(
            "attention: lag, window and log_forget are about the order of keys, and causal=False "
            "shows all keys of a document. Leave them out, or use causal=True."
        )


def check_places(
    q: Array, k: Array, causal: bool, segment_ids: Array | None, places: Places | None
) -> None:
    """Check that it is known where queries and keys stand.

    Raises:
      ShapeError: it is not, or places and documents do not fit.
      DTypeError: places or documents are no integers.
    """
    op, queries, keys = "attention", q.shape[:2], k.shape[:2]
    if places is None and queries != keys and (causal or segment_ids is not None):
        raise ShapeError(
            f"{op}: {queries[1]} queries and {keys[1]} keys without `places`. "
            "Say where each stands, or pass rows of equal length."
        )
    check_documents(op, queries, segment_ids)
    if places is None:
        return
    if segment_ids is not None:
        raise ShapeError(f"{op}: both `places` and `segment_ids`. Places hold documents too.")
    for name, expected in zip(Places._fields, (queries, keys, queries, keys), strict=True):
        what = f"one number per {'query' if expected is queries else 'key'}"
        check_shape(op, f"places.{name}", getattr(places, name), expected, what)
    check_integers(op, **{f"places.{name}": a for name, a in places._asdict().items()})
