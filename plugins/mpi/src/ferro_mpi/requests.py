"""Requests: waiting for what MPI does meanwhile, by a deadline.

MPI writes into the buffers of a request until it is done, and mpi4py does not hold them all. Here
they are held until then; those of requests that were given up, for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import suppress

from ferro import CollectiveMismatch, PeerLost
from ferro.types import Array
from ferro_mpi.mpi import MPI
from ferro_mpi.waiting import Lookout, Pause

_LAST_MESSAGES_S = 0.5  # how long what a rank sent before it left may take to arrive
_given_up: list[object] = []


def finish(
    request: MPI.Request,
    buffers: object,
    lookout: Lookout,
    deadline: float,
    awaited: Iterable[int],
) -> None:
    """Wait until a collective is done.

    Args:
        request: what is waited for.
        buffers: what MPI reads and writes until then.
        lookout: ends the wait.
        deadline: absolute `time.monotonic()` second.
        awaited: the ranks that take part.

    Raises:
        TimeoutError, GroupClosed, PeerLost: see `Lookout.look`.
        MPI.Exception: it failed.
    """
    test = request.Test
    for _ in range(lookout.looks):
        if test():
            return
    pause = Pause()
    try:
        while not test():
            lookout.look(deadline, awaited)
            pause()
    except BaseException:
        _given_up.append((request, buffers))
        raise


class Messages:
    """Messages under way: some to send, some to receive.

    Args:
        lookout: ends the wait.
    """

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout
        self._requests: list[MPI.Request] = []
        self._buffers: list[Array] = []
        self._peers: list[int] = []
        self._receives = 0

    def receive(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to receive a message of exactly the buffer's size; before any is sent."""
        self._keep(comm.Irecv(buffer, peer, tag), buffer, peer)
        self._receives += 1

    def send(self, comm: MPI.Intracomm, buffer: Array, peer: int, tag: int) -> None:
        """Begin to send a message."""
        self._keep(comm.Isend(buffer, peer, tag), buffer, peer)

    def _keep(self, request: MPI.Request, buffer: Array, peer: int) -> None:
        self._requests.append(request)
        self._buffers.append(buffer)
        self._peers.append(peer)

    def finish(self, deadline: float) -> None:
        """Wait until all are done.

        Raises:
            TimeoutError, GroupClosed, PeerLost: see `Lookout.look`.
            CollectiveMismatch: a message came that is shorter than expected.
            MPI.Exception: one failed.
        """
        statuses = [MPI.Status() for _ in self._requests]
        try:
            self._wait(statuses, deadline)
        except BaseException:
            self._give_up()
            raise
        for status, buffer, peer in zip(
            statuses[: self._receives], self._buffers, self._peers, strict=False
        ):
            came = status.Get_count(MPI.BYTE)
            if came != buffer.nbytes:
                raise CollectiveMismatch(
                    f"rank {peer} sent {came} bytes where {buffer.nbytes} were expected", peer=peer
                )

    def _wait(self, statuses: list[MPI.Status], deadline: float) -> None:
        test, requests = MPI.Request.Testall, self._requests
        for _ in range(self._lookout.looks):
            if test(requests, statuses):
                return
        pause = Pause()
        last = math.inf
        while not test(requests, statuses):
            self._lookout.look(deadline, self._peers)
            left = self._lookout.left(self._peers)
            if left is not None and time.monotonic() > (last := min(last, _last_moment())):
                raise PeerLost(f"rank {left} has left the group", peer=left)
            pause()

    def _give_up(self) -> None:
        """Take receives back, which MPI allows, and keep what is still in its hands."""
        for request in self._requests[: self._receives]:
            with suppress(MPI.Exception):
                request.Cancel()
        with suppress(MPI.Exception):
            if MPI.Request.Testall(self._requests):
                return
        _given_up.append((self._requests, self._buffers))


def _last_moment() -> float:
    return time.monotonic() + _LAST_MESSAGES_S
