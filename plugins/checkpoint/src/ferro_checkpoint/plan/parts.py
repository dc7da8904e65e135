"""Parts: what each rank has of a segment, or needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ferro.types import Array
from ferro_checkpoint.placement.boxes import Box, flat_boxes
from ferro_checkpoint.placement.local_array import LocalArray


class BoxPart(NamedTuple):
    """Elements of a segment that are a box, and not consecutive.

    Attributes:
        number: which of the rank's boxes of the array they lie in.
        box: the elements.
        slab: a box of consecutive elements of the segment, in which they lie; the part's offset is that of its first.
    """

    number: int
    box: Box
    slab: Box


class SegmentPart(NamedTuple):
    """Elements of an array in a segment that one rank holds.

    Attributes:
        rank: the rank.
        tensor: the array's number.
        offset: the first byte, counted from the segment's beginning.
        nbytes: how many bytes.
        lo: the array's first element of them; in a header, the first byte of the header.
        hi: one more than the last.
        boxed: given where they are not consecutive.
    """

    rank: int
    tensor: int
    offset: int
    nbytes: int
    lo: int
    hi: int
    boxed: BoxPart | None = None

    def place(self, segment: Array, dtype_itemsize: int) -> Array:
        """View the part's bytes in the segment's; of a box, as an array with a last dimension of an element's bytes."""
        if self.boxed is None:
            return segment[self.offset : self.offset + self.nbytes]
        slab = self.boxed.slab
        view = segment[self.offset : self.offset + slab.size * dtype_itemsize].reshape(*slab.extent, dtype_itemsize)
        return view[self.boxed.box.within(slab)]


def box_parts(
    rank: int, number: int, box: Box, tensor: int, shape: tuple[int, ...], itemsize: int, lo: int, hi: int, offset: int
) -> Iterator[SegmentPart]:
    """List what of an array's elements `lo` to `hi - 1` lies in one of a rank's boxes.

    Args:
        rank, number, box: the rank's box.
        tensor, shape, itemsize: the array.
        lo, hi: the elements of the array that the segment has.
        offset: where in the segment they begin, in bytes.
    """
    for slab in flat_boxes(shape, lo, hi):
        found = slab.meet(box)
        if found is not None:
            begin = 0
            for at, size in zip(slab.start, shape, strict=True):
                begin = begin * size + at
            yield SegmentPart(
                rank,
                tensor,
                offset + (begin - lo) * itemsize,
                found.size * itemsize,
                lo,
                hi,
                BoxPart(number, found, slab),
            )


class LocalArrays:
    """This rank's pieces, by the numbers of the arrays that all ranks agreed on.

    Args:
        local: the pieces.
        names: of the arrays, by number.
    """

    def __init__(self, local: Sequence[LocalArray], names: Sequence[str]) -> None:
        numbers = {name: number for number, name in enumerate(names)}
        self._first: list[LocalArray | None] = [None] * len(names)
        self._more: dict[int, list[LocalArray]] = {}  # of arrays of which this rank has several pieces
        for array in local:
            number = numbers[array.name]
            first = self._first[number]
            if first is None:
                self._first[number] = array
            else:
                self._more.setdefault(number, [first]).append(array)

    def view(self, part: SegmentPart) -> memoryview | None:
        """View the part's bytes in the array's own memory; None if they are not there in this order."""
        return None if part.boxed else self._of_range(part).range_view(part.lo, part.hi)

    def read(self, part: SegmentPart, out: Array) -> None:
        """Copy the part's bytes from the array."""
        if part.boxed is None:
            self._of_range(part).read(part.lo, part.hi, out)
        else:
            array, number = self._of_box(part.tensor, part.boxed.number)
            array.read_box(number, part.boxed.box, out)

    def write(self, part: SegmentPart, source: Array) -> None:
        """Copy the part's bytes into the array."""
        if part.boxed is None:
            self._of_range(part).write(part.lo, part.hi, source)
        else:
            array, number = self._of_box(part.tensor, part.boxed.number)
            array.write_box(number, part.boxed.box, source)

    def _of_range(self, part: SegmentPart) -> LocalArray:
        return next(each for each in self._of(part.tensor) if each.range and _lies_in(part, each.range))

    def _of_box(self, tensor: int, number: int) -> tuple[LocalArray, int]:
        for array in self._of(tensor):
            if number < len(array.boxes):
                return array, number
            number -= len(array.boxes)
        raise AssertionError(f"array {tensor} has no such box")

    def _of(self, tensor: int) -> Sequence[LocalArray]:
        first = self._first[tensor]
        assert first is not None, f"this rank has nothing of array {tensor}"
        return self._more.get(tensor, (first,))


def _lies_in(part: SegmentPart, held: tuple[int, int]) -> bool:
    return held[0] <= part.lo and part.hi <= held[1]


def as_bytes(array: Array) -> memoryview:
    """View a contiguous array's memory as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
