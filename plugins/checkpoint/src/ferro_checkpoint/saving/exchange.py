"""The exchange of a save: ranks send the parts of segments to the ranks that write them, in rounds of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.parts import SegmentPart
from ferro_checkpoint.plan.rows import HEADER
from ferro_checkpoint.saving.save_plan import SavePlan
from ferro_checkpoint.saving.segment_writer import SegmentWriter
from ferro_checkpoint.saving.snapshot import SuppliedBytes, fill_part

ROUND_BYTES = 16 << 20  # of the segments of all ranks in a round
_LEAST_ROUND_BYTES = 1 << 20  # of one rank's


def write_segments(
    plan: SavePlan, source: SuppliedBytes, writer: SegmentWriter, group: ProcessGroup | None, deadline: Deadline
) -> None:
    """Hand all segments of this rank to the writer; all ranks call it. Failures of the writer do not end it."""
    for number in plan.written:
        writer.submit(number, lambda number=number: _views(plan, source, number))  # type: ignore[misc]
    if group is None or plan.world_size == 1:
        return
    for batches in _rounds(plan):
        _exchange(plan, source, writer, group, batches, deadline)


def _views(plan: SavePlan, source: SuppliedBytes, number: int) -> list[memoryview]:
    """Return the bytes of a segment that this rank supplies alone."""
    parts = list(plan.supplies.of(number))
    if any(part.boxed for part in parts):
        segment = np.empty(plan.segments.end[number] - plan.segments.begin[number], np.uint8)
        for part in parts:
            if part.tensor == HEADER:
                part.place(segment, 1)[:] = np.frombuffer(plan.header_bytes(number, part), np.uint8)
        own = [part for part in parts if part.tensor != HEADER]
        source.fill(number, own, segment, [_itemsize(plan, part) for part in own])
        return [memoryview(segment)]  # type: ignore[arg-type]
    own = [part for part in parts if part.tensor != HEADER]
    views = source.views(number, own)
    headers = [(part, plan.header_bytes(number, part)) for part in parts if part.tensor == HEADER]
    if not headers:
        return views
    # A header comes first in its segment, for it comes first in its file.
    return [*(memoryview(text) for _, text in headers), *views]


def _rounds(plan: SavePlan) -> Iterator[list[list[int]]]:
    """Cut the segments that are exchanged into rounds: for each rank, the numbers of those that it writes."""
    most = max(ROUND_BYTES // plan.world_size, _LEAST_ROUND_BYTES)
    begin, end = plan.segments.begin, plan.segments.end
    at = [0] * plan.world_size
    while any(place < len(numbers) for place, numbers in zip(at, plan.exchanged, strict=True)):
        batches: list[list[int]] = []
        for rank, numbers in enumerate(plan.exchanged):
            batch: list[int] = []
            nbytes = 0
            while at[rank] < len(numbers):
                number = numbers[at[rank]]
                nbytes += end[number] - begin[number]
                if batch and nbytes > most:
                    break
                batch.append(number)
                at[rank] += 1
            batches.append(batch)
        yield batches


def _exchange(
    plan: SavePlan,
    source: SuppliedBytes,
    writer: SegmentWriter,
    group: ProcessGroup,
    batches: list[list[int]],
    deadline: Deadline,
) -> None:
    rank, world_size = plan.rank, plan.world_size
    parts = {number: list(plan.supplies.of(number)) for batch in batches for number in batch}
    send: list[memoryview] = []
    send_sizes, recv_sizes = [0] * world_size, [0] * world_size
    moved = False
    for to, batch in enumerate(batches):
        for number in batch:
            own: list[SegmentPart] = []
            for part in parts[number]:
                if part.rank == rank and part.tensor != HEADER:
                    own.append(part)
                moved = moved or part.rank != to
                if to == rank != part.rank:
                    recv_sizes[part.rank] += part.nbytes
            if to != rank and own:
                send += source.views(number, own)
                send_sizes[to] += sum(part.nbytes for part in own)
    received = np.empty(0, np.uint8)
    if moved:  # the same on every rank
        sent = np.concatenate([np.frombuffer(view, np.uint8) for view in send]) if send else received
        received = group.all_to_all(sent, send_sizes=send_sizes, recv_sizes=recv_sizes, timeout_s=deadline.left_s())
    places = [int(place) for place in np.cumsum([0, *recv_sizes[:-1]])]
    for number in batches[rank]:
        _put_together(plan, source, writer, number, parts[number], received, places)


def _put_together(
    plan: SavePlan,
    source: SuppliedBytes,
    writer: SegmentWriter,
    number: int,
    parts: list[SegmentPart],
    received: Array,
    places: list[int],
) -> None:
    """Write a segment of own and received parts. `places` has where each rank's next bytes are in `received`."""
    nbytes = plan.segments.end[number] - plan.segments.begin[number]
    segment = np.empty(nbytes, np.uint8)
    own: list[SegmentPart] = []
    for part in parts:
        if part.tensor == HEADER:
            part.place(segment, 1)[:] = np.frombuffer(plan.header_bytes(number, part), np.uint8)
        elif part.rank == plan.rank:
            own.append(part)
        else:
            place = places[part.rank]
            view = received[place : place + part.nbytes]
            places[part.rank] = place + part.nbytes
            fill_part(part, memoryview(view), segment, _itemsize(plan, part))  # type: ignore[arg-type]
    source.fill(number, own, segment, [_itemsize(plan, part) for part in own])
    writer.submit_copy(number, [memoryview(segment)], nbytes)  # type: ignore[arg-type]


def _itemsize(plan: SavePlan, part: SegmentPart) -> int:
    return int(plan.holdings.itemsizes[part.tensor])
