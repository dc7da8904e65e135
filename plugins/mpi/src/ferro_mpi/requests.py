"""Wait for MPI's requests until a deadline.

MPI uses the buffers of a request until the request is done, and mpi4py does not keep all of them alive. So this module
keeps references to them until then; it keeps the buffers of abandoned requests for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import suppress

from ferro import CollectiveMismatch, PeerLost
from ferro.types import Array
from ferro_mpi.mpi import MPI
from ferro_mpi.waiting import Backoff, WaitMonitor

_LAST_MESSAGES_S = 0.5  # after a rank has left, time for its last messages to arrive
_abandoned: list[object] = []


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
        self._abandoned = False

    def receive(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to receive a message of exactly the buffer's size. Call it before any `send`."""
        self._buffers.append(buffer)  # first, for an interrupt may come when MPI has begun
        self._requests.append(comm.Irecv(buffer, peer, tag))
        self._peers.append(peer)
        self._receives += 1

    def send(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to send a message."""
        self._buffers.append(buffer)
        self._requests.append(comm.Isend(buffer, peer, tag))
        self._peers.append(peer)

    def wait(self, deadline: float) -> None:
        """Wait until all messages are sent and received.

        Raises:
            TimeoutError, GroupClosed, PeerLost: see `WaitMonitor.check`.
            CollectiveMismatch: a message came that is shorter than expected.
            MPI.Exception: a transfer failed.
        """
        statuses = [MPI.Status() for _ in self._requests]
        try:
            self._wait(statuses, deadline)
        except BaseException:
            self.abandon()
            raise
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
        backoff = Backoff()
        give_up_s = math.inf
        while not test(requests, statuses):
            self._monitor.check(deadline, self._peers)
            left = self._monitor.departed_rank(self._peers)
            if left is not None:
                now = time.monotonic()
                give_up_s = min(give_up_s, now + _LAST_MESSAGES_S)
                if now > give_up_s:
                    raise PeerLost(f"rank {left} has left the group", peer=left)
            backoff()

    def abandon(self) -> None:
        """Cancel receives, which MPI allows, and keep the buffers that MPI may still use. Idempotent."""
        if self._abandoned:
            return
        self._abandoned = True
        _abandoned.append((self._requests, self._buffers))
        for request in self._requests[: self._receives]:
            with suppress(MPI.Exception):
                request.Cancel()
        with suppress(MPI.Exception):
            MPI.Request.Testall(self._requests)
