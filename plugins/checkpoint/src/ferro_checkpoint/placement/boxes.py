"""Boxes: blocks of an array with a first index and a size in each dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Box(NamedTuple):
    """A block of an array.

    Attributes:
        start: its first index in each dimension.
        extent: its size in each dimension.
    """

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.extent)

    def consecutive(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Find its place in the flattened array of this shape.

        Returns:
            Its first element, and one more than its last, if its elements are consecutive there; else None.
        """
        first, inner, seen_part = 0, 1, False
        for begin, size, whole in zip(reversed(self.start), reversed(self.extent), reversed(shape), strict=True):
            if seen_part and size != 1:
                return None
            seen_part = seen_part or size != whole
            first += begin * inner
            inner *= whole
        return first, first + self.size

    def meet(self, other: Box) -> Box | None:
        """Return the elements that both have; None if there are none."""
        start, extent = [], []
        for begin, size, other_begin, other_size in zip(
            self.start, self.extent, other.start, other.extent, strict=True
        ):
            low, high = max(begin, other_begin), min(begin + size, other_begin + other_size)
            if high <= low:
                return None
            start.append(low)
            extent.append(high - low)
        return Box(tuple(start), tuple(extent))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the indices of this box in an array that holds the elements of `outer`, in which it lies."""
        return tuple(
            slice(begin - outer_begin, begin - outer_begin + size)
            for begin, size, outer_begin in zip(self.start, self.extent, outer.start, strict=True)
        )

    def moved(self, by: tuple[int, ...]) -> Box:
        """Return the box of which each index is greater by this."""
        return Box(tuple(begin + more for begin, more in zip(self.start, by, strict=True)), self.extent)


def whole_box(shape: tuple[int, ...]) -> Box:
    """Return the box of all elements of an array."""
    return Box((0,) * len(shape), shape)


def flat_boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Cut elements `first` to `last - 1` of a flattened array into boxes, in order: at most 2 n - 1 of n dimensions.

    A range of rows and parts of rows of a matrix, for example, is the end of a row, some whole rows, and the
    beginning of a row.
    """
    if last <= first:
        return
    if first == 0 and last == math.prod(shape):
        yield whole_box(shape)
        return
    inner = math.prod(shape[1:])
    row, begin = divmod(first, inner)
    last_row, end = divmod(last, inner)
    if begin and row == last_row:
        yield from _of_row(row, flat_boxes(shape[1:], begin, end))
        return
    if begin:
        yield from _of_row(row, flat_boxes(shape[1:], begin, inner))
        row += 1
    if last_row > row:
        yield Box((row, *(0,) * (len(shape) - 1)), (last_row - row, *shape[1:]))
    if end:
        yield from _of_row(last_row, flat_boxes(shape[1:], 0, end))


def _of_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *box.start), (1, *box.extent)) for box in boxes)
