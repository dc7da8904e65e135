"""Transfers: one pass's messages along one route, sent behind the computing, received ahead of it.

Each route has a group of its own, of two ranks. So a message waits for none of another route,
also on a backend that launches a group's operations one after the other on a device's queue.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from ferro import CollectiveMismatch, FerroError, Work

from ..nn.arrays import Array
from .header import Header
from .line import Line
from .routes import Route

_SOURCE, _TARGET = 0, 1  # ranks in a route's group


class Stopped(Exception):
    """The rank at the other end has stopped this pass, because it or yet another one failed."""


class Sender:
    """Sends a pass's arrays along one route, in their order.

    Args:
        route: which.
        line: its end here.
    """

    def __init__(self, route: Route, line: Line) -> None:
        self._line = line
        self._left = len(route.order)
        self._works: deque[Work[None]] = deque()

    def send(self, microbatch: int, array: Array) -> None:
        """Start to send an array, which nobody changes from now on."""
        header = Header.of(array, microbatch)
        self._post(self._line.packed(header, array))
        if not self._line.fits(header):
            self._post(array)
        self._line.note(header)
        self._left -= 1

    def stop(self) -> None:
        """Say that no more will come, if more was to come."""
        if self._left:
            self._left = 0
            self._post(self._line.last_word())

    def finish(self) -> None:
        """Wait until all has been sent; raise what went wrong."""
        while self._works:
            self._works.popleft().wait()

    def _post(self, array: Array) -> None:
        while self._works and self._works[0].done():
            self._works.popleft().wait()
        self._works.append(self._line.group.send(array, _TARGET, async_op=True, copy=False))


class Receiver:
    """Receives a pass's arrays along one route, each once it is asked for.

    The next message comes in while the rank computes; an array that follows by itself (see
    `line`) once it is taken, for only then is it known.

    Args:
        route: which.
        line: its end here.
    """

    def __init__(self, route: Route, line: Line) -> None:
        self._route = route
        self._line = line
        self._place = {microbatch: index for index, microbatch in enumerate(route.order)}
        self._asked = 0
        self._received = 0
        self._under_way: Work[Array] | None = None
        self._arrived: dict[int, Array] = {}
        self._failed = False

    def ask(self, microbatch: int) -> None:
        """Start to receive this microbatch's array, after those sent before it."""
        self._asked = max(self._asked, self._place[microbatch] + 1)
        self._start()

    def take(self, microbatch: int) -> Array:
        """Wait for this microbatch's array; each can be taken once.

        Raises:
            Stopped: the sender has stopped.
            FerroError: of the transfer.
        """
        self.ask(microbatch)
        while microbatch not in self._arrived:
            self._receive()
        return self._arrived.pop(microbatch)

    def drain(self) -> None:
        """Receive what is still sent, so that nothing of this pass is left on the way."""
        self._asked = len(self._route.order)
        with suppress(FerroError, Stopped):
            while self._received < self._asked and not self._failed:
                self._start()
                self._receive()

    def _start(self) -> None:
        """Start to receive the next message, if it is asked for and not under way."""
        if self._under_way is None and self._received < self._asked:
            # Asynchronous in any case: then backends know that the caller's thread computes.
            self._under_way = self._line.group.recv(self._line.empty(), _SOURCE, async_op=True)

    def _receive(self) -> None:
        """Wait for the message under way; keep its array, and start to receive the next."""
        assert self._under_way is not None, "what is waited for has been asked for"
        try:
            header, array = self._line.unpacked(self._under_way.wait())
            if header is None:
                raise Stopped(f"rank {self._route.source} has stopped")
            self._check(header.microbatch)
            if array is None:
                work = self._line.group.recv(header.empty(), _SOURCE, async_op=True)
                array = work.wait()
        except BaseException:
            self._failed = True
            raise
        self._line.note(header)
        self._arrived[header.microbatch] = array
        self._received += 1
        self._under_way = None
        self._start()

    def _check(self, microbatch: int) -> None:
        expected = self._route.order[self._received]
        if microbatch != expected:
            raise CollectiveMismatch(
                f"Pipeline: rank {self._route.source} sent microbatch {microbatch} where "
                f"the {self._route} were to go on with {expected}. Call step and forward in "
                "the same order, with the same number of microbatches, on every rank.",
                op="recv",
                group=self._line.group.name,
                peer=self._route.source,
            )
