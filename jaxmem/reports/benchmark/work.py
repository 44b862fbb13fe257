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
