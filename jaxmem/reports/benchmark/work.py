"""What a computation must at least do, and how long that takes at the ceilings of a device."""

from typing import NamedTuple


class Pass(NamedTuple):
    """Least work of one pass over the data."""

    bytes: float
    """Moved between the processor and its memory, each operand and result once."""
    flops: float


class Work(NamedTuple):
    """Least work of an op."""

    forward: Pass
    backward: Pass

    @property
    def both(self) -> Pass:
        """Forward and backward, one after the other."""
        return Pass(*(a + b for a, b in zip(self.forward, self.backward, strict=True)))


class Ceilings(NamedTuple):
    """What the device does at best, measured in the same run."""

    copy: float
    """Bytes per second of a large copy, reads and writes counted."""
    matmul: float
    """FLOPs per second of a large matrix product in the dtype at hand."""


def floor_ms(work: Pass, ceilings: Ceilings) -> float:
    """Return the time below which no implementation can go, in milliseconds."""
    return 1e3 * max(work.bytes / ceilings.copy, work.flops / ceilings.matmul)


def recurrence(elements: int, itemsize: int, *, gates: int) -> Work:
    """Work of a diagonal recurrence.

    Forward reads x and the gates and writes h. Backward reads dh, h and the gates and writes dx and
    the gradients of the gates.

    Args:
      elements: of x and of h.
      itemsize: bytes per element.
      gates: numbers that say how the state decays and what is added; those per head do not count.
    """
    forward, backward = 2 * elements + gates, 3 * elements + 2 * gates
    return Work(Pass(forward * itemsize, 2 * elements), Pass(backward * itemsize, 4 * elements))


def softmax_read(
    rows: int, columns: int, width: int, *, itemsize: int, tables: int, row_elements: int
) -> Work:
    """Work of a softmax over `columns` pairs for `rows` queries, once per table.

    A product of (rows, columns, width) is 2 rows columns width FLOPs. Forward takes two; backward
    five, for the weights are computed again.

    Args:
      rows: queries per table, on average those that see `columns` pairs.
      columns: pairs that a query sees.
      width: of keys and values.
      itemsize: bytes per element.
      tables: independent softmaxes per query: heads, times batch or banks.
      row_elements: elements that forward reads and writes; backward takes twice as many.
    """
    product = 2 * rows * columns * width * tables
    moved = row_elements * itemsize
    return Work(Pass(moved, 2 * product), Pass(2 * moved, 5 * product))


CHUNK = 64
"""Tokens per chunk that the work of linear attention is counted at."""


def linear_read(
    tokens: int,
    heads: int,
    groups: int,
    width: int,
    value_width: int,
    *,
    itemsize: int,
    gates: int,
) -> Work:
    """Work of linear attention in chunks of C: a matrix inside, a state (K, V) in between.

    Forward takes 2 C (K + V) + 4 K V FLOPs per token and head, and backward, which makes weights
    and states again, 2 C (3 K + 2 V) + 10 K V; where heads share queries and keys, these are
    multiplied once. Forward moves q, k, v and y, backward q, k, v, dy, dq, dk and dv.

    Args:
      tokens: of all rows.
      heads: heads of values.
      groups: heads of queries and keys.
      width: of keys.
      value_width: of values.
      itemsize: bytes per element.
      gates: float32 numbers per token and head; backward reads them and writes their gradients.
    """
    forward = heads * (CHUNK * value_width + 2 * width * value_width) + groups * CHUNK * width
    backward = heads * (CHUNK * 2 * (width + value_width) + 5 * width * value_width)
    backward += groups * CHUNK * width
    keys, values = groups * width * itemsize, heads * value_width * itemsize
    gate_bytes = 4 * heads * gates
    return Work(
        Pass(tokens * (2 * keys + 2 * values + gate_bytes), 2.0 * tokens * forward),
        Pass(tokens * (4 * keys + 3 * values + 2 * gate_bytes), 2.0 * tokens * backward),
    )


def squared_read(
    rows: int, length: int, heads: int, width: int, value_width: int, *, itemsize: int, gates: int
) -> Work:
    """Work of squared attention in the cheaper of its two forms.

    Over all pairs it is that of a softmax read, half of the pairs being visible; in chunks of C it
    is that of linear attention with K (K + 1) / 2 features, 2 C (K + V) + 4 F V FLOPs per token and
    head forward and 2 C (3 K + 2 V) + 10 F V backward. Both move what linear attention does.
    """
    tokens = rows * length
    moved = linear_read(tokens, heads, heads, width, value_width, itemsize=itemsize, gates=gates)
    state = 2 * (width * (width + 1) // 2) * value_width
    products = CHUNK * (width + value_width) + state, (length // 2) * (width + value_width)
    back = CHUNK * (3 * width + 2 * value_width) + 5 * state // 2
    backward = back, (length // 2) * (3 * width + 2 * value_width)
    return Work(
        Pass(moved.forward.bytes, 2.0 * tokens * heads * min(products)),
        Pass(moved.backward.bytes, 2.0 * tokens * heads * min(backward)),
    )
