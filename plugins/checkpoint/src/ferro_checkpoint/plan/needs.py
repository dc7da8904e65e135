"""Which rank needs which part of each segment that is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.opened.place import StoredPlace
from ferro_checkpoint.placement.boxes import Box
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.parts import SegmentPart, box_parts

Indices = NDArray[np.int64]


class ReadSegments:
    """The segments of the files of a checkpoint, one after the other, by addresses as if the files were one.

    Args:
        ends: for each file, one more than the last byte of each of its segments.

    Attributes:
        names: of the files.
        bases: the address of each file's first byte.
        begin: the address of each segment's first byte.
        end: one more than that of its last.
        file: the number of each segment's file.
        within: each segment's number in its file.
    """

    def __init__(self, ends: Mapping[str, Indices]) -> None:
        self.names = list(ends)
        sizes = [int(each[-1]) if len(each) else 0 for each in ends.values()]
        self.bases: list[int] = [0, *np.cumsum(sizes).tolist()]
        none = np.zeros(0, np.int64)
        shifted = [np.asarray(each, np.int64) + base for each, base in zip(ends.values(), self.bases, strict=False)]
        self.end: Indices = np.concatenate([none, *shifted])
        self.begin: Indices = (
            np.concatenate([none, self.end[:-1]]) if not len(self.end) else np.append(0, self.end[:-1])
        )
        counts = [len(each) for each in ends.values()]
        self.file: Indices = np.repeat(np.arange(len(counts)), counts)
        self.within: Indices = np.concatenate([none, *(np.arange(count) for count in counts)])

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first segment that has some of these addresses, and one more than the last."""
        return int(np.searchsorted(self.end, begin, "right")), int(np.searchsorted(self.begin, end, "left"))


class Needs:
    """Lists what each rank needs of each segment.

    Args:
        holdings: the arrays of the state that are loaded, and who holds what of them.
        places: where each array is in the checkpoint, by its number in the holdings.
        segments: of the checkpoint.
        world_size: number of ranks.
        path: of the checkpoint, for messages.
    """

    def __init__(
        self, holdings: Holdings, places: Sequence[StoredPlace], segments: ReadSegments, world_size: int, path: str
    ) -> None:
        self._holdings, self._segments, self._path = holdings, segments, path
        self._world_size = world_size
        base = dict(zip(segments.names, segments.bases, strict=False))
        self.addresses = np.array([base[place.file] + place.begin for place in places], np.int64)
        begin = self.addresses[holdings.tensor] + holdings.lo * holdings.itemsizes[holdings.tensor]
        end = self.addresses[holdings.tensor] + holdings.hi * holdings.itemsizes[holdings.tensor]
        self._ranges: list[tuple[Indices, Indices, Indices]] = []
        for rank in range(world_size):
            own = np.flatnonzero(holdings.rank == rank)
            own = own[np.argsort(begin[own], kind="stable")]
            self._ranges.append((begin[own], end[own], holdings.tensor[own]))
        self._boxes: list[list[tuple[int, int, int, int, Box]]] = [[] for _ in range(world_size)]
        for tensor, boxes in holdings.boxes.items():
            for rank, number, box in boxes:
                first, last = self._span(tensor, box)
                self._boxes[rank].append((first, last, tensor, number, box))

    def touched(self, rank: int) -> NDArray[np.bool_]:
        """Say for each segment whether this rank may need some of it."""
        segments = self._segments
        changes = np.zeros(len(segments.begin) + 1, np.int64)
        begin, end, _ = self._ranges[rank]
        np.add.at(changes, np.searchsorted(segments.end, begin, "right"), 1)
        np.add.at(changes, np.searchsorted(segments.begin, end, "left"), -1)
        for first, last, *_ in self._boxes[rank]:
            low, high = segments.between(first, last)
            changes[low] += 1
            changes[high] -= 1
        return np.cumsum(changes[:-1]) > 0

    def nbytes(self, rank: int) -> int:
        """Count the bytes that this rank needs."""
        begin, end, _ = self._ranges[rank]
        itemsizes = self._holdings.itemsizes
        return int((end - begin).sum()) + sum(box.size * int(itemsizes[at]) for _, _, at, _, box in self._boxes[rank])

    def of(self, rank: int, number: int) -> Iterator[SegmentPart]:
        """List what a rank needs of a segment, in order."""
        holdings = self._holdings
        seg_begin, seg_end = int(self._segments.begin[number]), int(self._segments.end[number])
        begin, end, tensors = self._ranges[rank]
        first = int(np.searchsorted(end, seg_begin, "right"))
        last = int(np.searchsorted(begin, seg_end, "left"))
        for at, to, tensor in zip(
            begin[first:last].tolist(), end[first:last].tolist(), tensors[first:last].tolist(), strict=True
        ):
            low, high = max(at, seg_begin), min(to, seg_end)
            lo, hi = self._elements(tensor, low, high)
            yield SegmentPart(rank, tensor, low - seg_begin, high - low, lo, hi)
        for at, to, tensor, box_number, box in self._boxes[rank]:
            low, high = max(at, seg_begin), min(to, seg_end)
            if low < high:
                lo, hi = self._elements(tensor, low, high)
                shape, itemsize = holdings.shapes[tensor], int(holdings.itemsizes[tensor])
                yield from box_parts(rank, box_number, box, tensor, shape, itemsize, lo, hi, low - seg_begin)

    def _span(self, tensor: int, box: Box) -> tuple[int, int]:
        """Return the addresses of a box's first element, and of the one after its last."""
        first = last = 0
        for size, at, extent in zip(self._holdings.shapes[tensor], box.start, box.extent, strict=True):
            first, last = first * size + at, last * size + at + extent - 1
        itemsize = int(self._holdings.itemsizes[tensor])
        address = int(self.addresses[tensor])
        return address + first * itemsize, address + (last + 1) * itemsize

    def _elements(self, tensor: int, low: int, high: int) -> tuple[int, int]:
        itemsize = int(self._holdings.itemsizes[tensor])
        lo, cut_low = divmod(low - int(self.addresses[tensor]), itemsize)
        hi, cut_high = divmod(high - int(self.addresses[tensor]), itemsize)
        if cut_low or cut_high:
            name = self._holdings.names[tensor]
            raise CheckpointDamaged(
                f"{self._path}: a segment ends within an element of {name!r}: the record is none of this package",
                path=self._path,
                tensor=name,
            )
        return lo, hi
