"""Operation: what the ranks show and take in one collective; Runner carries it out.

Usually everything passes through slots, chunk by chunk. Where all ranks that show anything have it
in an arena (`ProcessGroup.empty`), they say in their headers where, and the others use it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ferro.errors import BackendError, PeerLost
from ferro.types import Array
from ferro_gloo.shm.arena import Arenas, Place, forget
from ferro_gloo.shm.region import SLOTS, Region
from ferro_gloo.shm.stream import Stream
from ferro_gloo.tcp.backend import TcpBackend

# From this size on it pays to use arrays in place, though that takes a round more.
IN_PLACE_BYTES = 128 << 10


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
        in_place: called with the arrays of those ranks, by rank, when all can be used in place,
            instead of all the above. They stay as they are until all ranks have returned from it.
        uneven: ranks may disagree on `rounds`; the most of any counts, and a rank that knows of
            none has tried it in one round.
    """

    rounds: int
    show: Callable[[int, Array], object] | None = None
    take: Callable[[int, Sequence[Array]], object] | None = None
    dtype: np.dtype = np.dtype(np.uint8)  # noqa: RUF009 - immutable
    shared: Array | None = None
    showing: Sequence[int] | None = None
    in_place: Callable[[dict[int, Array]], object] | None = None
    uneven: bool = False


class Runner:
    """Carries out one group's operations, one after the other.

    Args:
        region: the memory of the group.
        stream: its chunks.
        part: its ranks over TCP.
        arenas: where arrays are that can be used in place.
    """

    def __init__(self, region: Region, stream: Stream, part: TcpBackend, arenas: Arenas) -> None:
        self._part = part
        self._arenas = arenas
        self._stream = stream
        self._region = region

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
        answer: Callable[[int, Sequence[Array], Array], object],
        deadline: float,
    ) -> None:
        """Carry out an operation with an answer to each chunk: shown, answered, taken.

        Args:
            operation: `rounds` counts chunks with their answers; `take` is given the answers.
            answer: makes of chunk k in all slots what this rank shows next, in the last argument.
            deadline: absolute `time.monotonic()` second.
        """
        number = self.open(operation, deadline)
        if number is None:
            return
        stream, me, rounds = self._stream, self._part.rank, operation.rounds
        stream.next = number + 2 * rounds
        show, take, slots = operation.show, operation.take, self._region.slots(operation.dtype)
        assert show is not None, "every rank shows"
        assert take is not None, "every rank takes"
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
            take(k, slots[(shown + 1) % SLOTS])

    def open(self, operation: Operation, deadline: float) -> int | None:
        """Show the first chunk and compare what all call.

        Returns:
            The first chunk's number; or None when the operation has been carried out in place.
        """
        place, mapped = self._offer(operation.shared), False
        try:
            number = self._meet(operation, place, deadline)
            if operation.in_place is None:
                return number
            places = self._places(operation, number)
            if places and None not in places.values():
                self._run_in_place(operation, places, number, deadline)
                mapped = True
                return None
        except BaseException:
            if place is not None:  # another rank may still come, and write where the array was
                self._arenas.retire(place)
            raise
        finally:
            if place is not None:
                self._arenas.withdraw(place, self._part.ranks if mapped else ())
        others_wait = any(places.values())  # those that have a place have not shown a chunk
        if operation.uneven:
            others_wait |= 0 in self._stream.rounds(number)  # and those that tried it in one round
        return self._meet(operation, None, deadline) if others_wait else number

    def _offer(self, shared: Array | None) -> Place | None:
        if shared is None or shared.nbytes < IN_PLACE_BYTES:
            return None
        return self._arenas.offer(shared, self._part.ranks)

    def _meet(self, operation: Operation, place: Place | None, deadline: float) -> int:
        stream = self._stream
        number = stream.open(place, operation.rounds)
        if place is None and operation.show is not None:
            slot = self._region.slots(operation.dtype)[number % SLOTS][self._part.rank]
            operation.show(0, slot)
        stream.meet(number, deadline)
        return number

    def _places(self, operation: Operation, number: int) -> dict[int, Place | None]:
        """Return where the arrays are of all ranks that show anything."""
        showing = range(self._part.world_size) if operation.showing is None else operation.showing
        return {rank: self._stream.place(rank, number) for rank in showing}

    def _run_in_place(
        self,
        operation: Operation,
        places: dict[int, Place | None],
        number: int,
        deadline: float,
    ) -> None:
        assert operation.in_place is not None, "the operation can be carried out in place"
        try:
            operation.in_place({rank: self._view(rank, place) for rank, place in places.items()})
            self._stream.show(number + 1)
            self._stream.wait(number + 1, deadline)
        except PeerLost as error:
            for rank, place in places.items():
                if self._part.names[rank] == error.peer:  # it cannot remove its name any more
                    forget(place)
            raise
        self._stream.next = number + 2

    def _view(self, rank: int, place: Place | None) -> Array:
        assert place is not None, "all that show have a place"
        try:
            return self._arenas.view(self._part.ranks[rank], place)
        except OSError as error:
            raise BackendError(
                f"rank {self._part.names[self._part.rank]} cannot map the memory of rank "
                f"{self._part.names[rank]}: {error}"
            ) from error
