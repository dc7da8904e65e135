"""Operation: what the ranks show and take in one collective; Runner carries it out.

Usually everything passes through slots, chunk by chunk. Where all ranks that show anything have it
in an arena (`ProcessGroup.empty`), they say in their headers where, and the others use it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.arena import PLACE, Arenas, Place
from ferro_gloo.shm.region import SLOTS, Region
from ferro_gloo.shm.stream import LOOK_S, NOWHERE, Stream
from ferro_gloo.tcp.backend import TcpBackend

# From this size on it pays to use arrays in place, though that takes a round more.
IN_PLACE_BYTES = 128 << 10
_MOST_REMEMBERED = 256  # combinations of the ranks' arrays


# Makes of chunk k, in all ranks' slots, what this rank shows next, in the last argument.
Answer: TypeAlias = Callable[[int, Sequence[Array], Array], object]


@dataclass(slots=True, kw_only=True)
class Operation:
    """What one rank does in a collective.

    Attributes:
        rounds: how many chunks that takes.
        show: writes chunk k into this rank's slot; None when it shows nothing.
        take: uses chunk k in all ranks' slots; None when it takes nothing.
        dtype: of the elements in the slots.
        shared: the array (uint8) that is shown, which may be used in place; None when that
            cannot be.
        showing: the ranks that show anything; all when None.
        in_place: called with the arrays of those ranks, by rank and in order of rank, when all
            can be used where they are, instead of all the above. They stay as they are until all
            ranks have returned from it.
        uneven: ranks may disagree on `rounds`; the most of any counts, and a rank that knows of
            none has tried it in one round.
    """

    rounds: int
    show: Callable[[int, Array], object] | None = None
    take: Callable[[int, Sequence[Array]], object] | None = None
    dtype: np.dtype = np.dtype(np.uint8)  # noqa: RUF009 - immutable
    shared: Array | None = None
    showing: Sequence[int] | None = None
    in_place: Callable[[Mapping[int, Array]], object] | None = None
    uneven: bool = False


class Runner:
    """Carries out one group's operations, one after the other.

    Args:
        region: the memory of the group.
        stream: its chunks.
        part: its ranks over TCP.
        arenas: where arrays are that can be used in place.
    """

    def __init__(
        self,
        region: Region,
        stream: Stream,
        part: TcpBackend,
        arenas: Arenas,
    ) -> None:
        self._part = part
        self._arenas = arenas
        self._stream = stream
        self._region = region
        self._ranks = range(part.world_size)
        self._known: dict[tuple[bytes, ...], dict[int, Array]] = {}

    def run(self, operation: Operation, deadline: float) -> None:
        """Carry out an operation in which a chunk that was taken is done with."""
        number = self.open(operation, deadline)
        if number is None:
            return
        stream, me, rounds = self._stream, self._part.rank, operation.rounds
        if operation.uneven:
            rounds = max(stream.rounds(number))
        stream.next = number + rounds
        show, take, slots = operation.show, operation.take, self._region.slots(operation.dtype)
        for k in range(rounds):
            if k + 1 < rounds:
                if show is not None:
                    show(k + 1, slots[(number + k + 1) % SLOTS][me])
                stream.show(number + k + 1)
            if k:
                stream.wait(number + k, deadline)
            if take is not None:
                take(k, slots[(number + k) % SLOTS])

    def run_in_turns(
        self,
        operation: Operation,
        answer: Answer,
        deadline: float,
    ) -> None:
        """Carry out an operation with an answer to each chunk: shown, answered, taken.

        Args:
            operation: `rounds` counts chunks with their answers; `take` is given the answers.
            answer: makes the answer.
            deadline: absolute `time.monotonic()` second.
        """
        number = self.open(operation, deadline)
        if number is None:
            return
        stream, me, rounds = self._stream, self._part.rank, operation.rounds
        stream.next = number + 2 * rounds
        show, take, slots = operation.show, operation.take, self._region.slots(operation.dtype)
        assert show is not None, "every rank shows"
        for k in range(rounds):
            shown = number + 2 * k
            if k:
                stream.wait(shown, deadline)
            answer(k, slots[shown % SLOTS], slots[(shown + 1) % SLOTS][me])
            stream.show(shown + 1)
            if k + 1 < rounds:
                show(k + 1, slots[(shown + 2) % SLOTS][me])
                stream.show(shown + 2)
            stream.wait(shown + 1, deadline)
            if take is not None:
                take(k, slots[(shown + 1) % SLOTS])

    def open(self, operation: Operation, deadline: float) -> int | None:
        """Show the first chunk and compare what all call.

        Returns:
            The first chunk's number; or None when the operation has been carried out in place.
        """
        place = self._place(operation.shared)
        try:
            number = self._meet(operation, place, deadline)
            if operation.in_place is None:
                return number
            places = self._stream.places(number)
            showing = self._ranks if operation.showing is None else operation.showing
            if all(places[rank] != NOWHERE for rank in showing):
                self._run_in_place(operation.in_place, places, number, deadline)
                return None
        except BaseException:
            if place is not None:  # another rank may still come, and write where the array was
                self._arenas.retire(place)
            raise
        others_wait = any(map(any, places))  # those that have a place have not shown a chunk
        if operation.uneven:
            others_wait |= 0 in self._stream.rounds(number)  # and those that tried it in one round
        return self._meet(operation, None, deadline) if others_wait else number

    def _place(self, shared: Array | None) -> Place | None:
        if shared is None or shared.nbytes < IN_PLACE_BYTES:
            return None
        return self._arenas.place(shared)

    def _meet(self, operation: Operation, place: Place | None, deadline: float) -> int:
        stream = self._stream
        number = stream.open(place, operation.rounds)
        if place is None and operation.show is not None:
            slot = self._region.slots(operation.dtype)[number % SLOTS][self._part.rank]
            operation.show(0, slot)
        stream.meet(number, deadline)
        return number

    def _run_in_place(
        self,
        action: Callable[[Mapping[int, Array]], object],
        places: tuple[bytes, ...],
        number: int,
        deadline: float,
    ) -> None:
        self._stream.next = number + 2
        began = time.monotonic()
        action(self._arrays(places))
        self._stream.show(number + 1)
        self._stream.wait(number + 1, deadline)
        if time.monotonic() - began > LOOK_S:
            # The others may have given up meanwhile, and used their arrays for something else.
            self._part.look(())

    def _arrays(self, places: tuple[bytes, ...]) -> Mapping[int, Array]:
        """Return the arrays that are at these places, by rank."""
        arrays = self._known.get(places)
        if arrays is None:
            arrays = {
                rank: self._arenas.view(self._part.ranks[rank], Place(*PLACE.unpack(place)))
                for rank, place in enumerate(places)
                if place != NOWHERE
            }
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[places] = arrays
        return arrays
