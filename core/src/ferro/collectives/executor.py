"""The executor: runs a schedule on any backend's `exchange`.

Chunks are cut into segments. A segment goes through all rounds of the schedule on its own, so
while segment s is in round r, segment s+1 can be in round r-1 and so on: each step exchanges
everything on one diagonal at once, and reducing a segment overlaps the transfer of the next.

              step 0   step 1   step 2   step 3
    round 0   seg 0    seg 1    seg 2
    round 1            seg 0    seg 1    seg 2

Between two ranks, messages go in the order (step, round, chunk), which both ranks derive from
the same schedule and the same chunk sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ferro.collectives.reduction import Reduction
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.collectives.schedule import Round, Schedule

SEGMENT_BYTES = 256 * 1024
_NOTHING = np.empty(0, np.uint8)


class Exchanger(Protocol):
    """What the executor needs of a backend."""

    rank: int

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `ferro.Backend.exchange`."""


class Execution:
    """One run of a schedule over the chunks of one buffer.

    Args:
        schedule: what this rank does.
        chunks: for each chunk number its one-dimensional contiguous array; None for chunks that
            this rank neither sends nor receives.
        backend: what moves the bytes.
        reduction: how received contributions are combined; None where nothing is reduced.
        at_once: the algorithm combines all contributions in one round.
        segment_bytes: how much of a chunk travels at once.
    """

    def __init__(
        self,
        schedule: Schedule,
        chunks: Sequence[Array | None],
        backend: Exchanger,
        *,
        reduction: Reduction | None = None,
        at_once: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.rounds = schedule.rounds
        self._chunks = chunks
        self._backend = backend
        self._reduction = reduction
        self._at_once = at_once
        self._segment_bytes = segment_bytes
        self._staging: dict[tuple[int, int, int], Array] = {}

    def run(self, *, tag: int, deadline: float) -> None:
        """Carry out every round; the chunks then hold the schedule's result."""
        rounds, segments = len(self.rounds), self._segments()
        for number in range(segments + rounds - 1):
            first, last = max(0, number - segments + 1), min(number, rounds - 1)
            step = _Step(self, [(r, number - r) for r in range(first, last + 1)])
            if step.sends or step.recvs:
                self._backend.exchange(step.sends, step.recvs, tag=tag, deadline=deadline)
                step.land()

    def _segments(self) -> int:
        sizes = (c.nbytes for c in self._chunks if c is not None)
        return max(1, -(-max(sizes, default=0) // self._segment_bytes))

    def segment(self, chunk: int, index: int) -> Array | None:
        """Return segment `index` of a chunk; segment 0 is always there, be it empty."""
        array = self._chunks[chunk]
        assert array is not None, f"the schedule moves chunk {chunk}, which this rank has not"
        if index == 0 and array.nbytes <= self._segment_bytes:
            return array
        length = max(1, self._segment_bytes // max(1, array.itemsize))
        start = index * length
        if index and start >= array.size:
            return None
        return array[start : start + length]

    def staging(self, round_index: int, peer: int, chunk: int, like: Array) -> Array:
        """Return memory, kept for the next segment, to receive a contribution in."""
        key = (round_index, peer, chunk)
        memory = self._staging.get(key)
        if memory is None or memory.size < like.size:
            memory = self._staging[key] = np.empty_like(like)
        return memory[: like.size]

    def combine(self, own: Array, parts: list[tuple[int, Array]]) -> None:
        """Reduce contributions into `own`, in order of rank."""
        assert self._reduction is not None, "a schedule without reduction received one"
        ordered = sorted([*parts, (self._backend.rank, own)], key=lambda part: part[0])
        place = next(i for i, part in enumerate(ordered) if part[1] is own)
        self._reduction.combine([part[1] for part in ordered], place, at_once=self._at_once)


class _Step:
    """What is exchanged at once, and what to do when it has landed."""

    def __init__(self, run: Execution, diagonal: list[tuple[int, int]]) -> None:
        self.sends: list[tuple[int, Array]] = []
        self.recvs: list[tuple[int, Array]] = []
        self._run = run
        self._combines: dict[tuple[int, int], tuple[Array, list[tuple[int, Array]]]] = {}
        self._copies: list[tuple[Array, Array]] = []
        for round_index, segment in diagonal:
            what = run.rounds[round_index]
            self._plan_sends(what, segment)
            self._plan_recvs(round_index, what, segment)

    def _plan_sends(self, what: Round, segment: int) -> None:
        for send in what.sends:
            if not send.chunks and segment == 0:
                self.sends.append((send.peer, _NOTHING))
            for chunk in send.chunks:
                view = self._run.segment(chunk, segment)
                if view is not None:
                    self.sends.append((send.peer, view))

    def _plan_recvs(self, round_index: int, what: Round, segment: int) -> None:
        sent = {chunk for send in what.sends for chunk in send.chunks}
        for recv in what.recvs:
            if not recv.chunks and segment == 0:
                self.recvs.append((recv.peer, _NOTHING))
            for chunk in recv.chunks:
                view = self._run.segment(chunk, segment)
                if view is None:
                    continue
                target = view
                if recv.reduce:
                    target = self._run.staging(round_index, recv.peer, chunk, view)
                    entry = self._combines.setdefault((round_index, chunk), (view, []))
                    entry[1].append((recv.peer, target))
                elif chunk in sent:  # what is sent must be the value from before the round
                    target = self._run.staging(round_index, recv.peer, chunk, view)
                    self._copies.append((view, target))
                self.recvs.append((recv.peer, target))

    def land(self) -> None:
        """Combine or copy what has arrived."""
        for own, parts in self._combines.values():
            self._run.combine(own, parts)
        for view, staged in self._copies:
            view[...] = staged
