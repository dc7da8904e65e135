"""Rows: all bytes of a checkpoint's files, cut where the ranks that hold them change.

| address 0                                                        end
| header | array a: rank 0 | rank 1 | array b: ranks 0, 1 | array c: boxes of ranks 0, 1 | header | …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.placement.boxes import Box, flat_boxes
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.file_layout import FileLayout

Indices = NDArray[np.int64]
HEADER = -1  # in place of an array's number
_FEW_BOXES = 4  # of so many, each pair is compared faster than arrays of them are made


@dataclass(slots=True)
class Rows:
    """Rows in order of their addresses, of which each has one set of holders.

    Attributes:
        begin: each row's first address.
        end: one more than its last.
        tensor: the number of the array that it is of; HEADER for a file's header.
        first: the position of its first holder in `holders`.
        count: how many holders it has; 0 where the row is an array of which ranks hold boxes.
        key: a number for each set of holders; rows of boxes have one each.
        holders: ranks.
    """

    begin: Indices
    end: Indices
    tensor: Indices
    first: Indices
    count: Indices
    key: Indices
    holders: Indices

    def of(self, row: int) -> list[int]:
        """List the ranks that hold a row, from the lowest."""
        first = int(self.first[row])
        ranks: list[int] = self.holders[first : first + int(self.count[row])].tolist()
        return ranks


def rows_of(holdings: Holdings, layout: FileLayout, world_size: int) -> Rows:
    """Find the rows.

    Raises:
        StateError: no rank holds some element, or boxes of two ranks overlap without being the same.
    """
    tensor, lo, hi, rank = _sorted(holdings.tensor, holdings.lo, holdings.hi, holdings.rank)
    other = (lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])
    if ((tensor[1:] == tensor[:-1]) & (lo[1:] < hi[:-1]) & other).any():
        tensor, lo, hi, rank = _cut_at_all_ends(holdings)
    plain = np.ones(len(holdings.names), bool)
    plain[list(holdings.boxes)] = False
    kept = plain[tensor] if len(tensor) else np.zeros(0, bool)
    tensor, lo, hi, rank = tensor[kept], lo[kept], hi[kept], rank[kept]
    new = np.ones(len(tensor), bool)
    new[1:] = (tensor[1:] != tensor[:-1]) | (lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])
    first = np.flatnonzero(new)
    count = np.diff(np.append(first, len(tensor)))
    row_tensor, row_lo, row_hi = tensor[first], lo[first], hi[first]
    _check_cover(holdings, plain, row_tensor, row_lo, row_hi)
    count = np.where(holdings.first_counts[row_tensor], 1, count)
    scattered = np.array(sorted(number for number in holdings.boxes if holdings.sizes[number]), np.int64)
    for number in scattered.tolist():
        _check_boxes(holdings, number)
    itemsizes, files = holdings.itemsizes, len(layout.files)
    header_begins = np.array(layout.bases[:-1], np.int64)
    begin = np.concatenate(
        [layout.addresses[row_tensor] + row_lo * itemsizes[row_tensor], layout.addresses[scattered], header_begins]
    )
    end = np.concatenate(
        [
            layout.addresses[row_tensor] + row_hi * itemsizes[row_tensor],
            layout.addresses[scattered] + holdings.sizes[scattered] * itemsizes[scattered],
            header_begins + np.array([len(file.header) for file in layout.files], np.int64),
        ]
    )
    place = np.argsort(begin, kind="stable")
    tensor = np.concatenate([row_tensor, scattered, np.full(files, HEADER)])[place]
    first = np.concatenate([first, np.zeros(len(scattered), np.int64), np.full(files, len(rank))])[place]
    count = np.concatenate([count, np.zeros(len(scattered), np.int64), np.full(files, world_size)])[place]
    holders = np.concatenate([rank, np.arange(world_size)])
    return Rows(begin[place], end[place], tensor, first, count, _keys(first, count, holders, world_size), holders)


def _sorted(tensor: Indices, lo: Indices, hi: Indices, rank: Indices) -> tuple[Indices, Indices, Indices, Indices]:
    order = np.lexsort((rank, hi, lo, tensor))
    return tensor[order], lo[order], hi[order], rank[order]


def _cut_at_all_ends(holdings: Holdings) -> tuple[Indices, Indices, Indices, Indices]:
    """Cut all pieces of consecutive elements where any other begins or ends, and sort them: array, lo, hi, rank.

    Pieces may overlap. FSDP over tensor parallelism, for example, cuts the same bias elsewhere on each rank of the
    tensor parallel group, if other parameters of its unit have pieces of uneven sizes there.
    """
    base = np.cumsum(holdings.sizes) - holdings.sizes  # all arrays, one after the other
    begins, ends = base[holdings.tensor] + holdings.lo, base[holdings.tensor] + holdings.hi
    edges = np.unique(np.concatenate([begins, ends]))
    first = np.searchsorted(edges, begins)
    count = np.searchsorted(edges, ends) - first
    piece = np.repeat(np.arange(len(first)), count)
    edge = np.arange(len(piece)) + np.repeat(first - (np.cumsum(count) - count), count)
    tensor = holdings.tensor[piece]
    return _sorted(tensor, edges[edge] - base[tensor], edges[edge + 1] - base[tensor], holdings.rank[piece])


def _keys(first: Indices, count: Indices, holders: Indices, world_size: int) -> Indices:
    """Give each set of holders a number of its own, which is the same for equal sets."""
    keys = -1 - np.arange(len(first))  # rows of boxes
    alone = count == 1
    keys[alone] = holders[first[alone]]
    keys[(count == world_size) & ~alone] = world_size
    known: dict[bytes, int] = {}
    for row in np.flatnonzero((count > 1) & (count < world_size)).tolist():
        ranks = holders[first[row] : first[row] + count[row]].tobytes()
        keys[row] = world_size + 1 + known.setdefault(ranks, len(known))
    return keys


def _check_cover(holdings: Holdings, plain: NDArray[np.bool_], tensor: Indices, lo: Indices, hi: Indices) -> None:
    """Check that the rows of each array follow each other from its first element to its last."""
    before = np.zeros(len(tensor), np.int64)
    same = tensor[1:] == tensor[:-1]
    before[1:][same] = hi[:-1][same]
    wrong = np.flatnonzero(lo != before)
    if len(wrong):
        row = int(wrong[0])
        _refuse(holdings, int(tensor[row]), int(before[row]), int(lo[row]))
    reached = np.zeros(len(holdings.names), np.int64)
    reached[tensor] = hi  # the last row of an array comes last
    short = np.flatnonzero((reached != holdings.sizes) & plain)
    if len(short):
        number = int(short[0])
        _refuse(holdings, number, int(reached[number]), int(holdings.sizes[number]))


def _refuse(holdings: Holdings, number: int, reached: int, next_one: int) -> None:
    name, size = holdings.names[number], int(holdings.sizes[number])
    if next_one > reached:
        raise StateError(f"{name!r}: no rank holds its elements {reached} to {next_one - 1} of {size}")
    raise AssertionError(f"{name!r}: pieces overlap at element {next_one} of {size}, though they were cut there")


def _check_boxes(holdings: Holdings, number: int) -> None:
    """Check that the pieces of an array of which ranks hold boxes cover it, and overlap only if they are the same."""
    shape, name = holdings.shapes[number], holdings.names[number]
    boxes = {box for _, _, box in holdings.boxes[number]}
    for piece in holdings.beside_boxes(number):
        boxes.update(flat_boxes(shape, int(holdings.lo[piece]), int(holdings.hi[piece])))
    ordered = sorted(boxes)
    found = _first_overlap(ordered)
    if found is not None:
        one, other = map(_box, found)
        raise StateError(
            f"{name!r}: pieces of different ranks overlap and are not the same: {one} and {other} of {shape}"
        )
    held = sum(box.size for box in boxes)
    if held != int(holdings.sizes[number]):
        raise StateError(f"{name!r}: the ranks hold {held} of its {holdings.sizes[number]} elements")


def _first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Return two of these boxes that have elements in common; None if there are none."""
    if len(boxes) <= _FEW_BOXES:
        return next((pair for pair in combinations(boxes, 2) if pair[0].meet(pair[1])), None)
    starts = np.array([box.start for box in boxes], np.int64)
    ends = starts + np.array([box.extent for box in boxes], np.int64)
    for place in range(1, len(boxes)):
        meets = ((starts[:place] < ends[place]) & (ends[:place] > starts[place])).all(axis=1)
        if meets.any():
            return boxes[int(np.flatnonzero(meets)[0])], boxes[place]
    return None


def _box(box: Box) -> str:
    return "[" + ", ".join(f"{at}:{at + size}" for at, size in zip(box.start, box.extent, strict=True)) + "]"
