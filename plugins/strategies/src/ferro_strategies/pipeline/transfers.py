"""Transfers: one pass's messages along one route, sent behind the computing, received ahead of it.

Each route has a group of its own, of two ranks. So a message waits for none of another route,
also on a backend that launches a group's operations one after the other on a device's queue.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeAlias

import numpy as np

from ferro import CollectiveMismatch, ProcessGroup, Work

from ..nn.arrays import Array, namespace_of
from .header import HEADER_BYTES, Header, decode, encode
from .routes import Route

_SOURCE, _TARGET = 0, 1  # ranks in a route's group

_Arrival: TypeAlias = "tuple[int, Work[Array]]"


class Stopped(Exception):
    """The rank at the other end has stopped this pass, because it or yet another one failed."""


class Sender:
    """Sends a pass's arrays along one route, in their order.

    Args:
        route: which.
        group: its group.
    """

    def __init__(self, route: Route, group: ProcessGroup) -> None:
        self._group = group
        self._left = len(route.order)
        self._works: deque[Work[None]] = deque()

    def send(self, microbatch: int, array: Array) -> None:
        """Start to send an array. It may be reused at once."""
        self._post(encode(Header.of(array, microbatch)))
        self._post(array)
        self._left -= 1

    def stop(self) -> None:
        """Say that no more will come, if more was to come."""
        if self._left:
            self._left = 0
            self._post(encode(None))

    def finish(self) -> None:
        """Wait until all has been sent; raise what went wrong."""
        while self._works:
            self._works.popleft().wait()

    def _post(self, array: Array) -> None:
        while self._works and self._works[0].done():
            self._works.popleft().wait()
        self._works.append(self._group.send(array, _TARGET, async_op=True))


class Receiver:
    """Receives a pass's arrays along one route, each once it is asked for.

    A thread reads the headers, for only then is it known what to receive; arrays come in while
    the rank computes.

    Args:
        route: which.
        group: its group.
        around: what the thread enters: see `surroundings`.
    """

    def __init__(
        self,
        route: Route,
        group: ProcessGroup,
        around: Iterable[AbstractContextManager[object]],
    ) -> None:
        self._route = route
        self._group = group
        self._around = tuple(around)
        self._place = {microbatch: index for index, microbatch in enumerate(route.order)}
        self._asked = 0
        self._permits = threading.Semaphore(0)
        self._closed = False
        self._arrivals: queue.SimpleQueue[_Arrival | BaseException] = queue.SimpleQueue()
        self._arrived: dict[int, Work[Array]] = {}
        self._thread = threading.Thread(
            target=self._receive, name=f"ferro-pipeline-{route}", daemon=True
        )
        self._thread.start()

    def ask(self, microbatch: int) -> None:
        """Start to receive this microbatch's array, and those sent before it."""
        self._permit(self._place[microbatch] + 1)

    def take(self, microbatch: int) -> Array:
        """Wait for this microbatch's array; each can be taken once.

        Raises:
            Stopped: the sender has stopped.
            FerroError: of the transfer.
        """
        self.ask(microbatch)
        while microbatch not in self._arrived:
            item = self._arrivals.get()  # the thread ends by a deadline, and says so
            if isinstance(item, BaseException):
                raise item
            self._arrived[item[0]] = item[1]
        return self._arrived.pop(microbatch).wait()

    def drain(self) -> None:
        """Receive what is still sent, so that the next pass finds nothing of this one."""
        self._permit(len(self._route.order))
        self._thread.join()

    def close(self) -> None:
        """Let the thread end, if it waits to be asked."""
        self._closed = True
        self._permits.release()

    def _permit(self, count: int) -> None:
        if count > self._asked:
            self._permits.release(count - self._asked)
            self._asked = count

    def _receive(self) -> None:
        try:
            with ExitStack() as stack:
                for context in self._around:
                    stack.enter_context(context)
                for microbatch in self._route.order:
                    self._permits.acquire()
                    if self._closed:
                        return
                    self._arrivals.put((microbatch, self._start(microbatch)))
        except BaseException as error:  # noqa: BLE001 - raised in `take`, whatever it is
            self._arrivals.put(error)

    def _start(self, microbatch: int) -> Work[Array]:
        raw = np.empty(HEADER_BYTES, np.uint8)
        # Asynchronous, and waited for: then backends know that the caller's thread computes.
        self._group.recv(raw, _SOURCE, async_op=True).wait()
        header = decode(raw)
        if header is None:
            raise Stopped(f"rank {self._route.source} has stopped")
        if header.microbatch != microbatch:
            raise CollectiveMismatch(
                f"Pipeline: rank {self._route.source} sent microbatch {header.microbatch} where "
                f"the {self._route} were to go on with {microbatch}. Call step and forward in "
                "the same order, with the same number of microbatches, on every rank.",
                op="recv",
                group=self._group.name,
                peer=self._route.source,
            )
        work: Work[Array] = self._group.recv(header.empty(), _SOURCE, async_op=True)
        return work


def surroundings(array: Array | None) -> tuple[AbstractContextManager[object], ...]:
    """Return what a thread enters to work where this one does: an array's GPU, and its stream."""
    if array is None or namespace_of(array) is np:
        return ()
    stream: AbstractContextManager[object] = namespace_of(array).cuda.get_current_stream()
    return array.device, stream  # type: ignore[return-value]  # a CuPy array's device
