"""The check that ranks which hold the same elements have the same values, so that a checkpoint is of one state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.placement.boxes import Box, flat_boxes
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.file_layout import FileLayout
from ferro_checkpoint.plan.parts import BoxPart, LocalArrays, SegmentPart, as_bytes
from ferro_checkpoint.plan.rows import HEADER, Rows
from ferro_checkpoint.plan.supplies import pieces_as_boxes

Check = Literal["sampled", "all", "none"]
CHECKS = ("sampled", "all", "none")
_SAMPLE_BYTES = 4096
_BLOCK_BYTES = 4 << 20


def compare_replicas(
    rows: Rows,
    holdings: Holdings,
    layout: FileLayout,
    local: LocalArrays,
    group: ProcessGroup,
    how: Check,
    deadline: Deadline,
) -> None:
    """Compare the elements that several ranks hold; all ranks call it.

    Args:
        rows, holdings, layout: the plan.
        local: this rank's arrays.
        group: the ranks.
        how: "sampled" compares the beginning, the middle and the end of every piece; "all" every byte; "none" nothing.
        deadline: of the collectives.

    Raises:
        StateError: ranks have different values, on all ranks alike; the message names an array and the ranks.
    """
    if how == "none":
        return
    by_holders: dict[str, list[_Shared]] = {}
    for each in [*_shared_rows(rows, holdings, layout), *_shared_boxes(holdings)]:
        by_holders.setdefault(",".join(map(str, each.ranks)), []).append(each)
    if not by_holders:
        return
    own: dict[str, np.ndarray] = {}
    for key, several in by_holders.items():
        if group.rank in several[0].ranks:
            own[key] = np.array([_digest(each, holdings, local, group.rank, how) for each in several], np.uint64)
    digests = group.all_gather_object(
        {key: xxhash.xxh3_64_intdigest(each.tobytes()) for key, each in own.items()}, timeout_s=deadline.left_s()
    )
    different = [key for key in by_holders if len({each[key] for each in digests if key in each}) > 1]
    if not different:
        return
    key = different[0]
    all_digests = group.all_gather_object(own.get(key), timeout_s=deadline.left_s())
    for place, each in enumerate(by_holders[key]):
        values = {rank: int(all_digests[rank][place]) for rank in each.ranks}
        first = each.ranks[0]
        other = next((rank for rank in each.ranks if values[rank] != values[first]), None)
        if other is not None:
            raise StateError(
                f"{holdings.names[each.tensor]!r} is on ranks {first} and {other}, and its values differ: replicas "
                f"have gone apart. Look for what changes them on some ranks alone; check_replicas='none' saves one "
                f"rank's"
            )


class _Shared(NamedTuple):
    """Elements that several ranks hold.

    Attributes:
        ranks: which, from the lowest.
        tensor: the array's number.
        size: how many elements.
        first: where they are consecutive in the whole array: the first of them.
        box: their box in an array of which some piece is not consecutive; else None.
        numbers: for each rank, the number of that box among its boxes of the array; -1 where its piece is consecutive.
    """

    ranks: list[int]
    tensor: int
    size: int
    first: int
    box: Box | None = None
    numbers: dict[int, int] = {}  # noqa: RUF012 - it is never changed


def _shared_rows(rows: Rows, holdings: Holdings, layout: FileLayout) -> Iterator[_Shared]:
    shared = np.flatnonzero((rows.count > 1) & (rows.tensor != HEADER))
    tensor = rows.tensor[shared]
    itemsizes, addresses = holdings.itemsizes[tensor], layout.addresses[tensor]
    first, last = (rows.begin[shared] - addresses) // itemsizes, (rows.end[shared] - addresses) // itemsizes
    for row, number, begin, end in zip(shared.tolist(), tensor.tolist(), first.tolist(), last.tolist(), strict=True):
        yield _Shared(rows.of(row), number, end - begin, begin)


def _shared_boxes(holdings: Holdings) -> Iterator[_Shared]:
    for tensor in holdings.boxes:
        if holdings.first_counts[tensor]:
            continue
        found: dict[Box, dict[int, int]] = {}
        for rank, number, box in pieces_as_boxes(holdings, tensor):
            found.setdefault(box, {}).setdefault(rank, number)
        for box, numbers in found.items():
            if len(numbers) > 1:
                first = 0  # of no use where a rank's box is not consecutive
                for at, size in zip(box.start, holdings.shapes[tensor], strict=True):
                    first = first * size + at
                yield _Shared(sorted(numbers), tensor, box.size, first, box, numbers)


def _digest(shared: _Shared, holdings: Holdings, local: LocalArrays, rank: int, how: Check) -> int:
    itemsize, size = int(holdings.itemsizes[shared.tensor]), shared.size
    digest = xxhash.xxh3_64()
    step = max((_SAMPLE_BYTES if how == "sampled" else _BLOCK_BYTES) // itemsize, 1)
    places = range(0, size, step)
    if how == "sampled" and len(places) > 3:
        places = range(0, size - step + 1, max((size - step) // 2, 1))
    for at in places:
        for part in _parts(shared, itemsize, rank, at, min(at + step, size)):
            view = local.view(part)
            if view is None:
                copied = np.empty(part.nbytes, np.uint8)
                local.read(part, copied)
                view = as_bytes(copied)
            digest.update(view)
    return digest.intdigest()


def _parts(shared: _Shared, itemsize: int, rank: int, begin: int, end: int) -> Iterator[SegmentPart]:
    """List elements `begin` to `end - 1` of the shared ones, as parts of this rank's pieces."""
    number = shared.numbers.get(rank, -1)
    if shared.box is None or number < 0:
        yield SegmentPart(rank, shared.tensor, 0, (end - begin) * itemsize, shared.first + begin, shared.first + end)
        return
    for box in flat_boxes(shared.box.extent, begin, end):
        own = box.moved(shared.box.start)
        yield SegmentPart(rank, shared.tensor, 0, own.size * itemsize, 0, 0, BoxPart(number, own, own))
