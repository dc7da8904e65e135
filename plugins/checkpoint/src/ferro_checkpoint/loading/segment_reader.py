"""Reading the segments of a load: straight into the arrays where their memory allows it, else through a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_checkpoint.loading.load_plan import LoadPlan
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.parts import Part, as_bytes

ROUND_BYTES = 16 << 20  # of the segments of all ranks in a round
_LEAST_ROUND_BYTES = 1 << 20  # of one rank's


class SegmentReader:
    """Reads what this rank needs, or reads for others.

    Args:
        opened: the checkpoint.
        plan: who reads what.
        itemsizes: of the arrays, by number.
        threads: how many read at the same time.
        progress: called with the bytes of each segment that was read, on any thread.
    """

    def __init__(
        self,
        opened: OpenedCheckpoint,
        plan: LoadPlan,
        itemsizes: Array,
        threads: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._opened, self._plan, self._progress = opened, plan, progress
        self._itemsizes = itemsizes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ferro-checkpoint")
        self._failure: Exception | None = None

    def run(self, group: ProcessGroup | None, deadline: Deadline) -> Exception | None:
        """Read everything; return the first failure of this rank, which others have not heard of yet.

        Raises:
            FerroError: a collective failed.
        """
        with self._pool:
            reads = [self._pool.submit(self._read_own, number) for number in self._plan.own]
            try:
                if group is not None:
                    self._exchange(group, deadline)
            except BaseException:
                self._pool.shutdown(wait=False, cancel_futures=True)
                raise
            for read in reads:
                read.result()
        return self._failure

    def _read_own(self, number: int) -> None:
        if self._failure is not None:
            return
        try:
            self._read_into_place(number, list(self._plan.needs.of(self._plan.rank, number)))
        except Exception as error:  # noqa: BLE001 - told to all ranks
            self._failure = self._failure or error

    def _read_into_place(self, number: int, parts: list[Part]) -> None:
        """Read a segment; what no part needs of it goes into scratch memory."""
        size = self._size(number)
        destinations: list[memoryview] = []
        copied: list[tuple[Part, Array]] = []
        at = 0
        for part in parts:
            view = None if part.boxed or part.offset < at else self._plan.local.view(part)
            if part.boxed or part.offset < at or (view is not None and view.readonly):
                self._spread(parts, self._read(number))
                return
            if part.offset > at:
                destinations.append(_scratch(part.offset - at))
            if view is None:
                copy: Array = np.empty(part.nbytes, np.uint8)
                copied.append((part, copy))
                view = as_bytes(copy)
            destinations.append(view)
            at = part.offset + part.nbytes
        if at < size:
            destinations.append(_scratch(size - at))
        self._opened.read_segment(self._name(number), int(self._plan.segments.within[number]), destinations)
        for part, copy in copied:
            self._plan.local.write(part, copy)
        if self._progress is not None:
            self._progress(size)

    def _read(self, number: int) -> Array:
        """Read a segment into memory of its own."""
        segment = np.zeros(self._size(number), np.uint8)
        if self._failure is None:
            try:
                within = int(self._plan.segments.within[number])
                self._opened.read_segment(self._name(number), within, [as_bytes(segment)])
                if self._progress is not None:
                    self._progress(segment.nbytes)
            except Exception as error:  # noqa: BLE001 - told to all ranks
                self._failure = self._failure or error
        return segment

    def _spread(self, parts: list[Part], segment: Array) -> None:
        for part in parts:
            self._plan.local.write(part, self._bytes(part, segment))

    def _bytes(self, part: Part, segment: Array) -> Array:
        """Return a part's bytes of a segment, in the order of the array's elements."""
        place = part.place(segment, int(self._itemsizes[part.tensor]))
        return np.ascontiguousarray(place).reshape(-1)

    def _exchange(self, group: ProcessGroup, deadline: Deadline) -> None:
        """Read for others, in rounds of bounded size; the segments of a round are read while the one before moves."""
        rank = self._plan.rank
        rounds = self._rounds()
        batches = next(rounds, None)
        reads = self._begin(batches)
        while batches is not None:
            segments = [read.result() for read in reads]
            following = next(rounds, None)
            reads = self._begin(following)
            self._move(group, batches, dict(zip(batches[rank], segments, strict=True)), deadline)
            batches = following

    def _begin(self, batches: list[list[int]] | None) -> list[Future[Array]]:
        return [] if batches is None else [self._pool.submit(self._read, each) for each in batches[self._plan.rank]]

    def _move(
        self, group: ProcessGroup, batches: list[list[int]], segments: dict[int, Array], deadline: Deadline
    ) -> None:
        plan, rank = self._plan, self._plan.rank
        sent: list[Array] = []
        send_sizes, recv_sizes = [0] * plan.world_size, [0] * plan.world_size
        for to in range(plan.world_size):
            for number, segment in segments.items():
                parts = list(plan.needs.of(to, number))
                if to == rank:
                    self._spread(parts, segment)
                    continue
                for part in parts:
                    sent.append(self._bytes(part, segment))
                    send_sizes[to] += part.nbytes
        expected: list[Part] = []
        for reader, batch in enumerate(batches):
            if reader != rank:
                for number in batch:
                    parts = list(plan.needs.of(rank, number))
                    expected += parts
                    recv_sizes[reader] += sum(part.nbytes for part in parts)
        message = np.concatenate(sent) if sent else np.empty(0, np.uint8)
        received = group.all_to_all(message, send_sizes=send_sizes, recv_sizes=recv_sizes, timeout_s=deadline.left_s())
        place = 0
        for part in expected:
            plan.local.write(part, received[place : place + part.nbytes])
            place += part.nbytes

    def _rounds(self) -> Iterator[list[list[int]]]:
        plan = self._plan
        most = max(ROUND_BYTES // plan.world_size, _LEAST_ROUND_BYTES)
        at = [0] * plan.world_size
        while any(place < len(numbers) for place, numbers in zip(at, plan.shared, strict=True)):
            batches: list[list[int]] = []
            for rank, numbers in enumerate(plan.shared):
                batch: list[int] = []
                nbytes = 0
                while at[rank] < len(numbers):
                    nbytes += self._size(numbers[at[rank]])
                    if batch and nbytes > most:
                        break
                    batch.append(numbers[at[rank]])
                    at[rank] += 1
                batches.append(batch)
            yield batches

    def _size(self, number: int) -> int:
        return int(self._plan.segments.end[number] - self._plan.segments.begin[number])

    def _name(self, number: int) -> str:
        return self._plan.segments.names[int(self._plan.segments.file[number])]


def _scratch(nbytes: int) -> memoryview:
    return as_bytes(np.empty(nbytes, np.uint8))
