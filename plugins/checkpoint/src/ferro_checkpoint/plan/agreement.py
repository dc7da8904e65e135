"""What all ranks know of each other's state before a byte moves: its arrays, and who holds which elements of them.

Every rank describes its arrays in a table of names, dtypes and shapes, and its pieces in arrays of numbers. Tables that
are equal are compared by their digests and not exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.placement.boxes import Box
from ferro_checkpoint.placement.local_array import COMPLEX128, LocalArray
from ferro_checkpoint.plan.deadline import Deadline

Indices = NDArray[np.int64]
_FIRST_VALUES_COUNT = 1  # flags of an array: `ArrayPiece.replicas_may_differ`
_ON_ALL_RANKS = 2  # and `ArrayPiece.on_all_ranks`


@dataclass(slots=True)
class Holdings:
    """The arrays of a state, and what each rank holds of them.

    Attributes:
        names: full names of the arrays.
        dtypes: of each, as files name them, or COMPLEX128.
        shapes: of each.
        sizes: of each, in elements.
        itemsizes: of each, in bytes.
        first_counts: for each, whether only the values of the lowest rank of several that hold an element count.
        tensor, lo, hi, rank: one entry per piece of consecutive elements: the array's number, its first element, one
            more than its last, the rank.
        boxes: by the number of an array, of which some piece is not consecutive: rank, number of the box among the
            rank's boxes of it, and the box.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    sizes: Indices
    itemsizes: Indices
    first_counts: NDArray[np.bool_]
    tensor: Indices
    lo: Indices
    hi: Indices
    rank: Indices
    boxes: dict[int, list[tuple[int, int, Box]]] = field(default_factory=dict)
    _beside_boxes: dict[int, list[int]] | None = None

    def beside_boxes(self, number: int) -> list[int]:
        """List the pieces of consecutive elements of an array, of which other pieces are boxes: places in `tensor`."""
        if self._beside_boxes is None:
            self._beside_boxes = {}
            places = np.flatnonzero(np.isin(self.tensor, np.array(list(self.boxes), np.int64)))
            for place, tensor in zip(places.tolist(), self.tensor[places].tolist(), strict=True):
                self._beside_boxes.setdefault(tensor, []).append(place)
        return self._beside_boxes.get(number, [])


@dataclass(slots=True)
class _Table:
    """This rank's arrays: `numbers` has each one's position by its name."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    itemsizes: list[int]
    flags: list[int]
    numbers: dict[str, int]


class Description:
    """What this rank tells others of its arrays.

    Args:
        local: its pieces.

    Attributes:
        digest: of all of it; equal descriptions have equal ones.
    """

    def __init__(self, local: Sequence[LocalArray]) -> None:
        self.table = _table(local)
        self.pieces = _pieces(local, self.table)
        table = self.table
        texts = ["\0".join(table.names), "\0".join(table.dtypes), str(table.shapes), str(table.flags)]
        self.table_digest = xxhash.xxh3_128_hexdigest("\0\0".join(texts).encode("utf-8", "surrogatepass"))
        digest = xxhash.xxh3_128(self.table_digest.encode())
        for name in sorted(self.pieces):
            digest.update(self.pieces[name].tobytes() + b"\0")
        self.digest = digest.hexdigest()


def agree_on_arrays(own: Description, group: ProcessGroup | None, deadline: Deadline) -> Holdings:
    """Exchange descriptions; all ranks of the group call it, and return the same.

    Raises:
        StateError: ranks disagree on an array, on all ranks alike; the message says which differ.
    """
    if group is None or group.world_size == 1:
        return _holdings(own.table, [own.pieces])
    digests = group.all_gather_object(own.table_digest, timeout_s=deadline.left_s())
    if len(set(digests)) == 1:
        return _holdings(own.table, group.all_gather_object(own.pieces, timeout_s=deadline.left_s()))
    table = own.table
    described = [table.names, table.dtypes, table.shapes, table.flags]
    merged, positions = _merge(group.all_gather_object(described, timeout_s=deadline.left_s()))
    pieces = group.all_gather_object(own.pieces, timeout_s=deadline.left_s())
    for rank, each in enumerate(pieces):
        for key in ("tensor", "box_tensor"):
            each[key] = positions[rank][each[key]]
    return _holdings(merged, pieces)


def _table(local: Sequence[LocalArray]) -> _Table:
    numbers: dict[str, int] = {}
    several: dict[str, list[Box]] = {}
    table = _Table([], [], [], [], [], numbers)
    for array in local:
        piece = array.piece
        number = numbers.setdefault(array.name, len(numbers))
        if number == len(table.names):
            table.names.append(array.name)
            table.dtypes.append(array.dtype_name)
            table.shapes.append(array.shape)
            table.itemsizes.append(array.itemsize)
            table.flags.append(_FIRST_VALUES_COUNT * piece.replicas_may_differ + _ON_ALL_RANKS * piece.on_all_ranks)
        elif (table.dtypes[number], table.shapes[number]) != (array.dtype_name, array.shape):
            raise StateError(f"{array.name!r} has pieces of different dtypes or shapes")
        else:
            several[array.name] = []
    for array in local if several else ():
        if array.name in several:
            _add_boxes(several[array.name], array)
    return table


def _add_boxes(boxes: list[Box], array: LocalArray) -> None:
    """Add a piece's boxes to those of other pieces of the same array on this rank; a load fills each element once."""
    for box in array.piece.boxes():
        if any(box.meet(other) for other in boxes):
            raise StateError(f"{array.name!r} has pieces on one rank that overlap: give each element once")
        boxes.append(box)


def _pieces(local: Sequence[LocalArray], table: _Table) -> dict[str, Any]:
    """Describe this rank's pieces in arrays of numbers."""
    ranges: list[tuple[int, int, int]] = []
    boxes: list[tuple[int, int]] = []  # the array's number, and the number of the box among its boxes
    sides: list[int] = []  # of all boxes, one after the other: start and extent
    found: dict[int, int] = {}
    for array in local:
        number = table.numbers[array.name]
        if array.range is not None and array.range[1] > array.range[0]:
            ranges.append((number, *array.range))
        for box in array.boxes:
            boxes.append((number, found.get(number, 0)))
            found[number] = found.get(number, 0) + 1
            sides += [*box.start, *box.extent]
    columns = np.array(ranges, np.int64).reshape(-1, 3)
    box_columns = np.array(boxes, np.int64).reshape(-1, 2)
    return {
        "tensor": columns[:, 0].copy(),
        "lo": columns[:, 1].copy(),
        "hi": columns[:, 2].copy(),
        "box_tensor": box_columns[:, 0].copy(),
        "box_number": box_columns[:, 1].copy(),
        "sides": np.array(sides, np.int64),
    }


def _merge(tables: Sequence[Any]) -> tuple[_Table, list[Indices]]:
    """Unite the ranks' tables; return with it the number of each rank's arrays in the united one."""
    merged = _Table([], [], [], [], [], {})
    first: list[int] = []  # the rank that had the array first
    known: list[set[int]] = []
    positions: list[Indices] = []
    for rank, (names, dtypes, shapes, flags) in enumerate(tables):
        places = []
        for name, dtype, shape, flag in zip(names, dtypes, shapes, flags, strict=True):
            number = merged.numbers.setdefault(name, len(merged.names))
            places.append(number)
            if number == len(merged.names):
                merged.names.append(name)
                merged.dtypes.append(dtype)
                merged.shapes.append(tuple(shape))
                merged.flags.append(flag)
                first.append(rank)
                known.append({rank})
                continue
            known[number].add(rank)
            merged.flags[number] |= flag & _FIRST_VALUES_COUNT
            had, has = (merged.dtypes[number], merged.shapes[number]), (dtype, tuple(shape))
            if had != has:
                other = f"{_of(had)} on rank {first[number]}"
                raise StateError(f"ranks disagree on {name!r}: it is {other}, and {_of(has)} on rank {rank}")
        positions.append(np.array(places, np.int64))
    for name, flag, ranks in zip(merged.names, merged.flags, known, strict=True):
        if flag & _ON_ALL_RANKS and len(ranks) < len(tables):
            lacking = sorted(set(range(len(tables))) - ranks)
            raise StateError(
                f"ranks disagree on the names of the state: {name!r} is on {_ranks(sorted(ranks))}, and not on "
                f"{_ranks(lacking)}"
            )
    merged.itemsizes = [8 if dtype == COMPLEX128 else ITEM_BYTES[dtype] for dtype in merged.dtypes]
    return merged, positions


def _holdings(table: _Table, pieces: Sequence[dict[str, Any]]) -> Holdings:
    tensor = np.concatenate([each["tensor"] for each in pieces])
    boxes: dict[int, list[tuple[int, int, Box]]] = {}
    for rank, each in enumerate(pieces):
        place = 0
        for number, box_number in zip(each["box_tensor"].tolist(), each["box_number"].tolist(), strict=True):
            dims = len(table.shapes[number])
            sides = each["sides"][place : place + 2 * dims].tolist()
            boxes.setdefault(number, []).append((rank, box_number, Box(tuple(sides[:dims]), tuple(sides[dims:]))))
            place += 2 * dims
    return Holdings(
        names=table.names,
        dtypes=table.dtypes,
        shapes=table.shapes,
        sizes=np.array([math.prod(shape) for shape in table.shapes], np.int64),
        itemsizes=np.array(table.itemsizes, np.int64),
        first_counts=np.array(table.flags, np.int64) & _FIRST_VALUES_COUNT > 0,
        tensor=tensor,
        lo=np.concatenate([each["lo"] for each in pieces]),
        hi=np.concatenate([each["hi"] for each in pieces]),
        rank=np.repeat(np.arange(len(pieces)), [len(each["tensor"]) for each in pieces]),
        boxes=boxes,
    )


def _of(described: tuple[str, tuple[int, ...]]) -> str:
    return f"{described[0]} {described[1]}"


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {some}"
