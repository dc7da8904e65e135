"""Posted transfers: outstanding ones that one thread begins and awaits together (see `Backend.posted_transfers`)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ferro import CollectiveMismatch
from ferro.types import Array
from ferro_mpi.mpi import MPI
from ferro_mpi.waiting import Backoff, DepartureCheck, WaitMonitor

_outstanding: set[PostedMessage] = set()  # keeps the buffers that MPI uses alive, whatever becomes of their group


@dataclass(slots=True, eq=False)
class PostedMessage:
    """A message under way, in pieces that MPI can count; `received` bytes have come."""

    handle: object
    buffer: Array
    peer: int
    is_receive: bool
    pieces: int
    received: int = 0


class PostedMpiTransfers:
    """One rank's outstanding transfers in a group.

    Args:
        monitor: ends the waits.
        comm_for: gives the communicator for a tag, or refuses the tag.
        cut: cuts a buffer into pieces.
        translated: makes ferro's error of MPI's.
    """

    def __init__(
        self,
        monitor: WaitMonitor,
        comm_for: Callable[[int], MPI.Intracomm],
        cut: Callable[[Array], Iterator[Array]],
        translated: Callable[[MPI.Exception], Exception],
    ) -> None:
        self._monitor = monitor
        self._comm_for = comm_for
        self._cut = cut
        self._translated = translated
        self._requests: list[MPI.Request] = []
        self._messages: list[PostedMessage] = []  # of each request
        self._statuses: list[MPI.Status] = []
        self._peers: Counter[int] = Counter()  # how many messages each has to receive or to send
        self._check_departed = DepartureCheck(monitor, self._peers)
        self._woken = False

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `PostedTransfers.isend`."""
        self._begin(self._comm_for(tag).Isend, handle, buffer, peer, tag, is_receive=False)

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `PostedTransfers.irecv`."""
        self._begin(self._comm_for(tag).Irecv, handle, buffer, peer, tag, is_receive=True)

    def _begin(
        self,
        method: Callable[[Array, int, int], MPI.Request],
        handle: object,
        buffer: Array,
        peer: int,
        tag: int,
        *,
        is_receive: bool,
    ) -> None:
        pieces = list(self._cut(buffer))
        message = PostedMessage(handle, buffer, peer, is_receive, len(pieces))
        _outstanding.add(message)
        self._peers[peer] += 1
        try:
            for piece in pieces:
                self._requests.append(method(piece, peer, tag))
                self._messages.append(message)
                if len(self._statuses) < len(self._requests):
                    self._statuses.append(MPI.Status())
        except MPI.Exception as error:
            raise self._translated(error) from error

    def wait_any(self, until: float) -> list[tuple[object, BaseException | None]]:
        """See `PostedTransfers.wait_any`."""
        backoff = Backoff()
        while not (ended := self._test()):
            if self._woken or time.monotonic() >= until:
                break
            self._monitor.check(math.inf, self._peers)
            self._check_departed()
            backoff()
        self._woken = False
        return ended

    def wake(self) -> None:
        """See `PostedTransfers.wake`; a wait sees it after its next pause, of half a millisecond at most."""
        self._woken = True

    def _test(self) -> list[tuple[object, BaseException | None]]:
        """Test all requests once; return the messages that have ended."""
        statuses = self._statuses[: len(self._requests)]
        try:
            indices = MPI.Request.Testsome(self._requests, statuses) or []
        except MPI.Exception as error:
            raise self._translated(error) from error
        ended: list[tuple[object, BaseException | None]] = []
        for index, status in zip(indices, statuses, strict=False):
            message = self._messages[index]
            message.pieces -= 1
            if message.is_receive:
                message.received += status.Get_count(MPI.BYTE)
            if not message.pieces:
                _outstanding.discard(message)
                self._peers[message.peer] -= 1
                if not self._peers[message.peer]:
                    del self._peers[message.peer]
                ended.append((message.handle, _size_error(message)))
        for index in sorted(indices, reverse=True):
            del self._requests[index], self._messages[index]
        return ended


def _size_error(message: PostedMessage) -> CollectiveMismatch | None:
    if not message.is_receive or message.received == message.buffer.nbytes:
        return None
    text = f"rank {message.peer} sent {message.received} bytes where {message.buffer.nbytes} were expected"
    return CollectiveMismatch(text, peer=message.peer)
