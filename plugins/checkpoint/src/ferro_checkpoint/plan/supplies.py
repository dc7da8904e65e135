"""Which rank supplies which part of each segment that is written."""

from __future__ import annotations

from collections.abc import Iterator

from ferro_checkpoint.placement.boxes import Box, flat_boxes
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.file_layout import FileLayout
from ferro_checkpoint.plan.parts import SegmentPart, box_parts
from ferro_checkpoint.plan.rows import HEADER, Rows
from ferro_checkpoint.plan.segments import Segments


class Supplies:
    """Lists the parts of segments; of several ranks that hold the same elements, the writer supplies them if it can.

    Args:
        holdings: who holds what.
        layout: the files.
        rows: all bytes, by who holds them.
        segments: what is written.
    """

    def __init__(self, holdings: Holdings, layout: FileLayout, rows: Rows, segments: Segments) -> None:
        self._holdings, self._layout, self._rows, self._segments = holdings, layout, rows, segments
        self._pieces: dict[int, list[tuple[int, int, Box]]] = {}

    def of(self, number: int) -> Iterator[SegmentPart]:
        """List the parts of a segment; every rank lists the same, in the same order."""
        rows, segments, holdings = self._rows, self._segments, self._holdings
        begin, end, writer = segments.begin[number], segments.end[number], segments.writer[number]
        own = slice(segments.first_row[number], segments.last_row[number])
        for row_begin, row_end, tensor, first, count in zip(
            rows.begin[own].tolist(),
            rows.end[own].tolist(),
            rows.tensor[own].tolist(),
            rows.first[own].tolist(),
            rows.count[own].tolist(),
            strict=True,
        ):
            low, high = max(begin, row_begin), min(end, row_end)
            if tensor == HEADER:
                yield SegmentPart(writer, HEADER, low - begin, high - low, low - row_begin, high - row_begin)
                continue
            address, itemsize = int(self._layout.addresses[tensor]), int(holdings.itemsizes[tensor])
            lo, hi = (low - address) // itemsize, (high - address) // itemsize
            if count == 0:
                yield from self._of_boxes(tensor, itemsize, lo, hi, low - begin, number)
                continue
            if count == 1:
                rank = int(rows.holders[first])
            else:
                holders = rows.holders[first : first + count]
                rank = writer if (holders == writer).any() else int(holders[number % count])
            yield SegmentPart(rank, tensor, low - begin, high - low, lo, hi)

    def _of_boxes(
        self, tensor: int, itemsize: int, lo: int, hi: int, offset: int, number: int
    ) -> Iterator[SegmentPart]:
        shape, writer = self._holdings.shapes[tensor], self._segments.writer[number]
        holders: dict[Box, list[tuple[int, int]]] = {}
        for rank, box_number, box in self._pieces_of(tensor):
            holders.setdefault(box, []).append((rank, box_number))
        for box, ranks in holders.items():
            if self._holdings.first_counts[tensor]:
                rank, box_number = min(ranks)
            else:
                rank, box_number = next((one for one in ranks if one[0] == writer), ranks[number % len(ranks)])
            if box_number >= 0:
                yield from box_parts(rank, box_number, box, tensor, shape, itemsize, lo, hi, offset)
                continue
            # The rank's piece is consecutive, though other ranks' pieces of this array are not.
            place = 0
            for at, size in zip(box.start, shape, strict=True):
                place = place * size + at
            low, high = max(lo, place), min(hi, place + box.size)
            if high > low:
                yield SegmentPart(rank, tensor, offset + (low - lo) * itemsize, (high - low) * itemsize, low, high)

    def _pieces_of(self, tensor: int) -> list[tuple[int, int, Box]]:
        """Return `pieces_as_boxes`, found once."""
        if tensor not in self._pieces:
            self._pieces[tensor] = pieces_as_boxes(self._holdings, tensor)
        return self._pieces[tensor]


def pieces_as_boxes(holdings: Holdings, tensor: int) -> list[tuple[int, int, Box]]:
    """List the pieces of an array of which some are boxes: rank, number of the box, or -1 where it is consecutive."""
    pieces = list(holdings.boxes[tensor])
    for piece in holdings.beside_boxes(tensor):
        boxes = flat_boxes(holdings.shapes[tensor], int(holdings.lo[piece]), int(holdings.hi[piece]))
        pieces += [(int(holdings.rank[piece]), -1, box) for box in boxes]
    return sorted(pieces)
