"""Wait for MPI's requests until a deadline.

MPI uses the buffers of a request until the request is done, and mpi4py does not keep all of them alive. So this module
keeps references to them until then; it keeps the buffers of abandoned requests for ever. A signal handler may raise an
exception after any step of Python's, so the step that begins a request also keeps it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import starmap
from typing import ClassVar

from ferro import CollectiveMismatch
from ferro.types import Array
from ferro_mpi.mpi import MPI
from ferro_mpi.waiting import Backoff, DepartureCheck, WaitMonitor

_abandoned: list[object] = []
_running: dict[int, list[object]] = {}


def begin(nonblocking: Callable[..., MPI.Request], arguments: tuple[object, ...]) -> list[object]:
    """Begin a collective; return what is kept for it, of which the last is the request, until `release`."""
    kept: list[object] = [arguments]
    _running[id(kept)] = kept
    kept.extend(starmap(nonblocking, (arguments,)))
    return kept


def release(kept: list[object]) -> None:
    """Keep no longer what a collective that is done has used."""
    del _running[id(kept)]


def wait_for(
    request: MPI.Request, buffers: object, monitor: WaitMonitor, deadline: float, awaited: Iterable[int]
) -> None:
    """Wait until a collective is done.

    Args:
        request: the request of the collective.
        buffers: the memory that MPI reads and writes until then.
        monitor: ends the wait.
        deadline: absolute `time.monotonic()` second.
        awaited: the ranks that take part.

    Raises:
        TimeoutError, GroupClosed, PeerLost: see `WaitMonitor.check`.
        MPI.Exception: the collective failed.
    """
    test = request.Test
    for _ in range(monitor.spins):
        if test():
            return
    backoff = Backoff()
    try:
        while not test():
            monitor.check(deadline, awaited)
            backoff()
    except BaseException:
        _abandoned.append((request, buffers))
        raise


class PersistentRequests:
    """Persistent requests of MPI, with the buffers that they use. They are freed once, before MPI is finalized."""

    _dropped: ClassVar[deque[PersistentRequests]] = deque()
    _all: ClassVar[weakref.WeakSet[PersistentRequests]] = weakref.WeakSet()

    def __init__(self, buffers: object) -> None:
        """Keep `buffers`; requests are added to the list `requests`."""
        self.requests: list[MPI.Prequest] = []
        self._buffers = buffers
        self.free_dropped()
        self._all.add(self)

    def drop(self) -> None:
        """Let the next new requests free these, of an object that became garbage in any thread."""
        self._dropped.append(self)

    def free(self) -> None:
        """Free the requests; keep those that are under way, and their buffers, for ever."""
        requests, self.requests = self.requests, []
        if not requests or MPI.Is_finalized():
            return
        try:
            if not MPI.Request.Testall(requests):
                _abandoned.append((requests, self._buffers))
                return
            for request in requests:
                request.Free()
        except MPI.Exception:
            _abandoned.append((requests, self._buffers))

    @classmethod
    def free_dropped(cls) -> None:
        """Free the requests of objects that became garbage."""
        while cls._dropped:
            cls._dropped.popleft().free()

    @classmethod
    def free_all(cls) -> None:
        """Free all requests, as MPI is about to be finalized."""
        cls.free_dropped()
        for requests in list(cls._all):
            requests.free()


class PendingMessages:
    """Sends and receives that have begun, to be waited for together.

    Args:
        monitor: ends the wait.
    """

    def __init__(self, monitor: WaitMonitor) -> None:
        self._monitor = monitor
        self._requests: list[MPI.Request] = []
        self._buffers: list[Array] = []
        self._peers: list[int] = []
        self._receives = 0

    def receive(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to receive a message of exactly the buffer's size. Call it before any `send`."""
        self._receives += 1
        self._begin(comm.Irecv, buffer, peer, tag)

    def send(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to send a message."""
        self._begin(comm.Isend, buffer, peer, tag)

    def _begin(self, nonblocking: Callable[..., MPI.Request], buffer: Array, peer: int, tag: int) -> None:
        self._buffers.append(buffer)
        self._peers.append(peer)
        self._requests.extend(starmap(nonblocking, ((buffer, peer, tag),)))

    def wait(self, deadline: float) -> None:
        """Wait until all messages are sent and received.

        Raises:
            TimeoutError, GroupClosed, PeerLost: see `WaitMonitor.check`.
            CollectiveMismatch: a message came that is shorter than expected.
            MPI.Exception: a transfer failed.
        """
        statuses = [MPI.Status() for _ in self._requests]
        self._wait(statuses, deadline)
        for status, buffer, peer in zip(statuses[: self._receives], self._buffers, self._peers, strict=False):
            received = status.Get_count(MPI.BYTE)
            if received != buffer.nbytes:
                raise CollectiveMismatch(
                    f"rank {peer} sent {received} bytes where {buffer.nbytes} were expected", peer=peer
                )

    def _wait(self, statuses: list[MPI.Status], deadline: float) -> None:
        test, requests = MPI.Request.Testall, self._requests
        for _ in range(self._monitor.spins):
            if test(requests, statuses):
                return
        backoff, check_departed = Backoff(), DepartureCheck(self._monitor, self._peers)
        while not test(requests, statuses):
            self._monitor.check(deadline, self._peers)
            check_departed()
            backoff()

    def abandon(self) -> None:
        """Cancel receives, which MPI allows, and keep the buffers that MPI may still use."""
        for request in self._requests[: self._receives]:
            with suppress(MPI.Exception):
                request.Cancel()
        with suppress(MPI.Exception):
            if MPI.Request.Testall(self._requests):
                return
        _abandoned.append((self._requests, self._buffers))
