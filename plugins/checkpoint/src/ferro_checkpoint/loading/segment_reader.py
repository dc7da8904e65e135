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
from ferro_checkpoint.plan.parts import SegmentPart, as_bytes

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

    def _read_into_place(self, number: int, parts: list[SegmentPart]) -> None:
        """Read a segment; what no part needs of it goes into scratch memory."""
        size = self._size(number)
        destinations: list[memoryview] = []
        copied: list[tuple[SegmentPart, Array]] = []
        at = 0
        for part in parts:
            view = None if part.boxed or part.offset < at else self._plan.local.view(part)
            if part.boxed or part.offset < at or (view is not None and view.readonly):
                self._spread(parts, self._read(number, np.empty(size, np.uint8)))
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

    def _read(self, number: int, segment: Array) -> Array:
        """Read a segment into memory that is not the arrays'; return that."""
        if self._failure is None:
            try:
                within = int(self._plan.segments.within[number])
                self._opened.read_segment(self._name(number), within, [as_bytes(segment)])
                if self._progress is not None:
                    self._progress(segment.nbytes)
            except Exception as error:  # noqa: BLE001 - told to all ranks
                self._failure = self._failure or error
        return segment

    def _spread(self, parts: list[SegmentPart], segment: Array) -> None:
        for part in parts:
            self._plan.local.write(part, self._bytes(part, segment))

    def _bytes(self, part: SegmentPart, segment: Array) -> Array:
        """Return a part's bytes of a segment, in the order of the array's elements."""
        place = part.place(segment, int(self._itemsizes[part.tensor]))
        return np.ascontiguousarray(place).reshape(-1)

    def _exchange(self, group: ProcessGroup, deadline: Deadline) -> None:
        """Read for others, in rounds of bounded size; the segments of a round are read while the one before moves.

        All rounds use the same memory: to find new pages for each of them would take longer than to fill them.
        """
        rank = self._plan.rank
        rounds = list(self._rounds())
        most = max((sum(map(self._size, batches[rank])) for batches in rounds), default=0)
        memories = [np.empty(most, np.uint8) for _ in rounds[:2]]
        received: Array = np.empty(0, np.uint8)
        reads = self._begin(rounds[0][rank], memories[0]) if rounds else []
        for turn, batches in enumerate(rounds):
            for read in reads:
                read.result()
            if turn + 1 < len(rounds):
                reads = self._begin(rounds[turn + 1][rank], memories[(turn + 1) % 2])
            received = self._move(group, batches, memories[turn % 2], received, deadline)

    def _begin(self, numbers: list[int], memory: Array) -> list[Future[Array]]:
        """Read segments into memory, one after the other."""
        reads, place = [], 0
        for number in numbers:
            reads.append(self._pool.submit(self._read, number, memory[place : place + self._size(number)]))
            place += self._size(number)
        return reads

    def _move(
        self, group: ProcessGroup, batches: list[list[int]], memory: Array, received: Array, deadline: Deadline
    ) -> Array:
        """Send the segments of a round that this rank has read, and take what it needs of the others'.

        Args:
            group: the ranks.
            batches: for each rank, the numbers of the segments that it has read.
            memory: those of this rank.
            received: memory to receive into, if it is enough.
            deadline: of the load.

        Returns:
            the memory that was received into.
        """
        plan, rank = self._plan, self._plan.rank
        ends = np.cumsum([self._size(number) for number in batches[rank]]).tolist()
        sent: list[tuple[int, Array]] = []  # where it is in `memory`
        sizes = np.zeros((2, plan.world_size), np.int64)
        for to in range(plan.world_size):
            for number, end in zip(batches[rank], ends, strict=True):
                segment = memory[end - self._size(number) : end]
                parts = list(plan.needs.of(to, number))
                if to == rank:
                    self._spread(parts, segment)
                    continue
                begin = end - self._size(number)
                sent += [(-1 if part.boxed else begin + part.offset, self._bytes(part, segment)) for part in parts]
                sizes[0, to] += sum(part.nbytes for part in parts)
        expected: list[SegmentPart] = []
        for reader, batch in enumerate(batches):
            for number in batch if reader != rank else ():
                parts = list(plan.needs.of(rank, number))
                expected += parts
                sizes[1, reader] += sum(part.nbytes for part in parts)
        nbytes = int(sizes[1].sum())
        if nbytes > received.nbytes:
            received = np.empty(nbytes, np.uint8)
        group.all_to_all(
            _joined(sent, memory),
            send_sizes=sizes[0].tolist(),
            recv_sizes=sizes[1].tolist(),
            out=received[:nbytes],
            timeout_s=deadline.left_s(),
        )
        place = 0
        for part in expected:
            plan.local.write(part, received[place : place + part.nbytes])
            place += part.nbytes
        return received

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


def _joined(pieces: list[tuple[int, Array]], memory: Array) -> Array:
    """Return pieces one after the other, without a copy if that is how they are in memory, at the given places."""
    if not pieces:
        return memory[:0]
    first = end = pieces[0][0]
    for place, piece in pieces:
        if place != end or place < 0:
            return np.concatenate([piece for _, piece in pieces])
        end += piece.nbytes
    return memory[first:end]


def _scratch(nbytes: int) -> memoryview:
    return as_bytes(np.empty(nbytes, np.uint8))
