"""Transfers: one pass's messages along one route, sent behind the computing, received ahead of it.

Each route has a group of its own, of two ranks. So a message waits for none of another route,
also on a backend that launches a group's operations one after the other on a device's queue.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from ferro import CollectiveMismatch, FerroError, Work

from ..nn.arrays import Array
from .blame import blaming
from .call import Call
from .header import Header
from .line import Line
from .routes import Route

_SOURCE, _TARGET = 0, 1  # ranks in a route's group
_NO_MICROBATCH = -1  # to which the last word belongs


class Stopped(Exception):
    """The rank at the other end has stopped this pass, because it or yet another one failed."""


class Sender:
    """Sends a pass's arrays along one route, in their order.

    Args:
        route: which.
        line: its end here.
        call: what this rank does.
    """

    def __init__(self, route: Route, line: Line, call: Call) -> None:
        self._route = route
        self._line = line
        self._call = call
        self._left = len(route.order)
        self._stopped = False
        self._works: deque[tuple[int, Work[None]]] = deque()

    def send(self, microbatch: int, array: Array) -> None:
        """Start to send an array, which nobody changes from now on."""
        header = Header.of(array, microbatch)
        self._post(microbatch, self._line.packed(self._call, header, array))
        if not self._line.fits(header):
            self._post(microbatch, array)
        self._line.note(header)
        self._left -= 1

    def stop(self, *, anyway: bool = False) -> None:
        """Say, once, that no more will come: if more was to come, or `anyway`."""
        if (self._left or anyway) and not self._stopped:
            self._stopped = True
            self._post(_NO_MICROBATCH, self._line.last_word(self._call))

    def finish(self) -> None:
        """Wait until all has been sent; raise what went wrong."""
        while self._works:
            self._end_first()

    def _post(self, microbatch: int, array: Array) -> None:
        while self._works and self._works[0][1].done():
            self._end_first()
        with blaming(self._route, self._line, microbatch):
            work = self._line.group.send(array, _TARGET, async_op=True, copy=False)
        self._works.append((microbatch, work))

    def _end_first(self) -> None:
        microbatch, work = self._works.popleft()
        with blaming(self._route, self._line, microbatch):
            work.wait()


class Receiver:
    """Receives a pass's arrays along one route, each once it is asked for.

    The next message comes in while the rank computes; an array that follows by itself (see
    `line`) once it is taken, for only then is it known.

    Args:
        route: which.
        line: its end here.
        call: what this rank does.

    Attributes:
        other_call: what the sender does instead, once a message has said so; else None.
    """

    def __init__(self, route: Route, line: Line, call: Call) -> None:
        self.other_call: Call | None = None
        self._route = route
        self._line = line
        self._call = call
        self._place = {microbatch: index for index, microbatch in enumerate(route.order)}
        self._total = len(route.order)
        self._asked = 0
        self._received = 0
        self._under_way: Work[Array] | None = None
        self._arrived: dict[int, Array] = {}
        self._ended = False

    def ask(self, microbatch: int) -> None:
        """Start to receive this microbatch's array, after those sent before it."""
        self._asked = max(self._asked, self._place[microbatch] + 1)
        with blaming(self._route, self._line, microbatch):
            self._start()

    def take(self, microbatch: int) -> Array:
        """Wait for this microbatch's array; each can be taken once.

        Raises:
            Stopped: the sender has stopped.
            CollectiveMismatch: the sender makes another call.
            FerroError: of the transfer.
        """
        self.ask(microbatch)
        while microbatch not in self._arrived:
            with blaming(self._route, self._line, microbatch):
                self._keep(self._next())
                self._start()
        return self._arrived.pop(microbatch)

    def drain(self) -> None:
        """Receive what is still sent, so that nothing of this pass is left on the way."""
        with suppress(FerroError):
            while self._received < self._total and not self._ended:
                self._asked = self._total
                self._start()
                self._next()

    def _start(self) -> None:
        """Start to receive the next message, if it is asked for and not under way."""
        if self._under_way is None and self._received < self._asked:
            # Asynchronous in any case: then backends know that the caller's thread computes.
            self._under_way = self._line.group.recv(self._line.empty(), _SOURCE, async_op=True)

    def _next(self) -> tuple[int, Array] | None:
        """Wait for the message under way: a microbatch and its array, or None if it is the last."""
        assert self._under_way is not None, "what is waited for has been asked for"
        try:
            call, header, array = self._line.unpacked(self._under_way.wait())
            if call != self._call:
                self.other_call, self._total = call, call.microbatches
            if header is None:
                self._ended = True
                return None
            if array is None:
                work = self._line.group.recv(header.empty(), _SOURCE, async_op=True)
                array = work.wait()
        except BaseException:
            self._ended = True
            raise
        self._line.note(header)
        self._received += 1
        self._under_way = None
        return header.microbatch, array

    def _keep(self, message: tuple[int, Array] | None) -> None:
        """Put an array where it is taken from, if it belongs to this pass."""
        route = self._route
        if self.other_call is not None:
            raise self._mismatch(
                f"rank {route.source} called {self.other_call}, rank {route.target} {self._call}"
            )
        if message is None:
            raise Stopped(f"rank {route.source} has stopped")
        microbatch, array = message
        expected = route.order[self._received - 1]
        if microbatch != expected:
            raise self._mismatch(
                f"rank {route.source} sent microbatch {microbatch} where the {route} were to go "
                f"on with {expected}"
            )
        self._arrived[microbatch] = array

    def _mismatch(self, what: str) -> CollectiveMismatch:
        return CollectiveMismatch(
            f"Pipeline on group {self._line.pipeline!r}: {what}. Call step and forward in the same "
            "order, with the same number of microbatches, on every rank.",
            op=self._call.op,
            group=self._line.pipeline,
            rank=self._route.target,
            peer=self._route.source,
        )
