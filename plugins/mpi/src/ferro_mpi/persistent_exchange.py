"""MpiPersistentExchange: many messages that MPI prepares once and starts again and again.

Source: MPI standard 4.0, section 3.9 (MPI_Send_init, MPI_Recv_init, MPI_Startall).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from ferro import GroupClosed
from ferro_mpi.mpi import MPI
from ferro_mpi.requests import PersistentRequests
from ferro_mpi.waiting import Backoff, DepartureCheck, WaitMonitor


class MpiPersistentExchange:
    """A persistent exchange on one rank; see `PersistentExchange`.

    Args:
        requests: inactive ones, of all messages.
        peers: the ranks of the messages.
        monitor: ends the waits.
        translated: makes ferro's error of MPI's.
    """

    has_progress = False  # MPI moves large messages while it is called

    def __init__(
        self,
        requests: PersistentRequests,
        peers: Sequence[int],
        monitor: WaitMonitor,
        translated: Callable[[MPI.Exception], Exception],
    ) -> None:
        self._kept = requests
        self._requests = requests.requests
        self._peers = peers
        self._monitor = monitor
        self._translated = translated
        self._spins = range(monitor.spins)
        self._under_way = False
        self._error: BaseException | None = None  # which `finish` raises
        self._release = weakref.finalize(self, requests.drop)

    def __call__(self) -> bool:
        """See `PersistentExchange.__call__`."""
        self.start()
        test, requests = MPI.Request.Testall, self._requests
        try:
            for _ in self._spins:
                if test(requests):
                    self._under_way = False
                    return True
                self._monitor.yield_core()
        except BaseException as error:  # noqa: BLE001 - `finish` raises it, which ends the group
            self._error = error
        return False

    def start(self) -> None:
        """See `PersistentExchange.start`."""
        if self._under_way:  # an interrupt has left the last step in the middle
            self._error = self._error or GroupClosed("an earlier step was interrupted")
            return
        self._under_way = True
        try:
            MPI.Prequest.Startall(self._requests)
        except BaseException as error:  # noqa: BLE001 - as above
            self._error = error

    def test(self) -> bool:
        """See `PersistentExchange.test`; an error is left to `finish`."""
        if self._under_way and self._error is None:
            try:
                self._under_way = not MPI.Request.Testall(self._requests)
            except MPI.Exception as error:
                self._error = error
        return not self._under_way

    def finish(self, *, deadline: float) -> None:
        """See `PersistentExchange.finish`."""
        backoff, check_departed = Backoff(), DepartureCheck(self._monitor, self._peers)
        while not self.test():
            if self._error is not None:
                error = self._error
                raise (self._translated(error) if isinstance(error, MPI.Exception) else error) from error.__cause__
            self._monitor.check(deadline, self._peers)
            check_departed()
            backoff()

    def close(self) -> None:
        """See `PersistentExchange.close`."""
        if self._release.detach():
            self._kept.free()
