"""Run a schedule on any backend's `exchange`.

Chunks are cut into segments. A segment goes through all rounds of the schedule on its own, so that while segment s is
in round r, segment s+1 can be in round r-1 and so on. Each step exchanges everything on one diagonal at once, and the
reduction of a segment overlaps the transfer of the next.

              step 0   step 1   step 2   step 3
    round 0   seg 0    seg 1    seg 2
    round 1            seg 0    seg 1    seg 2

Between two ranks, messages go in the order (step, round, chunk), which both ranks derive from the same schedule and
the same chunk sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ferro.collectives.choice import Choice
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.collectives.schedule import Schedule

SEGMENT_BYTES = 256 * 1024
_NOTHING = np.empty(0, np.uint8)

Transfer: TypeAlias = tuple[int, Array]
"""A peer, and the array that goes to it or comes from it."""

# (round, chunk) -> this rank's own segment, and the contributions to combine with it.
_Combinations: TypeAlias = dict[tuple[int, int], tuple[Array, list[Transfer]]]
_Copy: TypeAlias = tuple[Array, Array]  # a segment, and the staging memory that holds its new value


class Transport(Protocol):
    """The part of a backend that its default methods use; see `ferro.Backend` for each attribute and method."""

    rank: int
    world_size: int
    choice: Choice
    call: Call
    labels_frames: bool

    @property
    def tag(self) -> int: ...
    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None: ...
    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None: ...
    def exchange(self, sends: Sequence[Transfer], recvs: Sequence[Transfer], *, tag: int, deadline: float) -> None: ...


@dataclass(slots=True)
class Execution:
    """One run of a schedule over `chunks`, an array for each chunk number.

    Chunks that this rank neither sends nor receives are None. `at_once` says that the algorithm combines all
    contributions in one round.
    """

    transport: Transport
    schedule: Schedule
    chunks: Sequence[Array | None]
    reduction: Reduction | None
    at_once: bool
    staging: dict[tuple[int, int, int], Array] = field(default_factory=dict, init=False)

    def run(self, deadline: float) -> None:
        """Carry out every round; the chunks then hold the schedule's result."""
        sizes = (chunk.nbytes for chunk in self.chunks if chunk is not None)
        segments = max(1, -(-max(sizes, default=0) // SEGMENT_BYTES))
        last_round, tag = len(self.schedule.rounds) - 1, self.transport.tag
        for step in range(segments + last_round):
            sends: list[Transfer] = []
            recvs: list[Transfer] = []
            combines: _Combinations = {}
            copies: list[_Copy] = []
            for index in range(max(0, step - segments + 1), min(step, last_round) + 1):
                self._plan_sends(index, step - index, sends)
                self._plan_recvs(index, step - index, recvs, combines, copies)
            if sends or recvs:
                self.transport.exchange(sends, recvs, tag=tag, deadline=deadline)
                for own, parts in combines.values():
                    self._combine(own, parts)
                for view, staged in copies:
                    view[...] = staged

    def _plan_sends(self, index: int, segment: int, sends: list[Transfer]) -> None:
        for send in self.schedule.rounds[index].sends:
            if not send.chunks and segment == 0:
                sends.append((send.peer, _NOTHING))
            for chunk in send.chunks:
                view = self._segment(chunk, segment)
                if view is not None:
                    sends.append((send.peer, view))

    def _plan_recvs(
        self, index: int, segment: int, recvs: list[Transfer], combines: _Combinations, copies: list[_Copy]
    ) -> None:
        sent = {chunk for send in self.schedule.rounds[index].sends for chunk in send.chunks}
        for recv in self.schedule.rounds[index].recvs:
            if not recv.chunks and segment == 0:
                recvs.append((recv.peer, _NOTHING))
            for chunk in recv.chunks:
                view = self._segment(chunk, segment)
                if view is None:
                    continue
                target = view
                if recv.reduce:
                    target = self._staged((index, recv.peer, chunk), view)
                    combines.setdefault((index, chunk), (view, []))[1].append((recv.peer, target))
                elif chunk in sent:  # the value from before the round is sent, so it must not be overwritten yet
                    target = self._staged((index, recv.peer, chunk), view)
                    copies.append((view, target))
                recvs.append((recv.peer, target))

    def _segment(self, chunk: int, index: int) -> Array | None:
        """View segment `index` of a chunk, or return None beyond its end; segment 0 always exists, even if empty."""
        array = self.chunks[chunk]
        assert array is not None, f"the schedule moves chunk {chunk}, which this rank has not"
        if index == 0 and array.nbytes <= SEGMENT_BYTES:
            return array
        length = max(1, SEGMENT_BYTES // max(1, array.itemsize))
        start = index * length
        return None if index and start >= array.size else array[start : start + length]

    def _staged(self, key: tuple[int, int, int], like: Array) -> Array:
        """Allocate memory to receive a message; the next segment with this round, peer and chunk uses it again."""
        memory = self.staging.get(key)
        if memory is None or memory.size < like.size:
            memory = self.staging[key] = np.empty_like(like)
        return memory[: like.size]

    def _combine(self, own: Array, parts: list[Transfer]) -> None:
        """Reduce contributions into `own`, in order of rank."""
        assert self.reduction is not None, "a schedule without reduction received one"
        ordered = sorted([*parts, (self.transport.rank, own)], key=lambda part: part[0])
        place = next(i for i, part in enumerate(ordered) if part[1] is own)
        self.reduction.combine([part[1] for part in ordered], place, at_once=self.at_once)
