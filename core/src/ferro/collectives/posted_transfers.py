"""Posted transfers: begun without waiting, then awaited together by one thread.

A group carries out its outstanding transfers this way (`Backend.posted_transfers`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from ferro.types import Array

if TYPE_CHECKING:
    from ferro.collectives.executor import Transport

Ended: TypeAlias = Sequence[tuple[object, BaseException | None]]
"""Handles of transfers that have ended, each with its error."""


class PostedTransfers(Protocol):
    """One rank's outstanding transfers in a group; one thread calls all methods but `wake`."""

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Begin to send. `wait_any` returns `handle` when the buffer may be used again; never blocks."""

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Begin to receive. `wait_any` returns `handle` when the buffer is full; never blocks."""

    def wait_any(self, until: float) -> Ended:
        """Wait until a transfer has ended, `wake` is called, or the `time.monotonic()` second `until` has come.

        The group keeps the deadlines, and forgets its transfers when one has failed.
        """

    def wake(self) -> None:
        """End the wait that is under way in another thread, or else the next one."""


def move_all(
    posted: PostedTransfers, channels: Mapping[tuple[str, int], Iterator[Array]], tag: int, deadline: float
) -> None:
    """Move sequences of messages at the same time, and wait for all of them.

    Args:
        posted: moves them.
        channels: ("send" or "recv", peer) -> the messages, one after the other.
        tag: of all messages.
        deadline: absolute `time.monotonic()` second.
    """
    moving = dict(channels)
    ended: Ended = [(channel, None) for channel in moving]
    while True:
        for handle, error in ended:
            if error is not None:
                raise error
            direction, peer = channel = cast("tuple[str, int]", handle)
            buffer = next(moving[channel], None)
            if buffer is None:
                del moving[channel]
            else:
                post = posted.isend if direction == "send" else posted.irecv
                post(channel, buffer, peer, tag=tag, deadline=deadline)
        if not moving:
            return
        ended = posted.wait_any(deadline)
        if not ended and time.monotonic() >= deadline:
            raise TimeoutError("the deadline passed")


class ThreadedTransfers:
    """Posted transfers made of a backend's `send` and `recv`: a thread for each that is outstanding."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._changed = threading.Condition()
        self._ended: list[tuple[object, BaseException | None]] = []
        self._woken = False

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._start(handle, "send", buffer, peer, tag, deadline)

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._start(handle, "recv", buffer, peer, tag, deadline)

    def _start(self, handle: object, method: str, *arguments: object) -> None:
        threading.Thread(
            target=self._run, args=(handle, method, *arguments), name=f"ferro-{method}", daemon=True
        ).start()

    def _run(self, handle: object, method: str, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        error: BaseException | None = None
        try:
            getattr(self._transport, method)(buffer, peer, tag=tag, deadline=deadline)
        except BaseException as raised:  # noqa: BLE001 - the group raises it
            error = raised
        with self._changed:
            self._ended.append((handle, error))
            self._changed.notify_all()

    def wait_any(self, until: float) -> Ended:
        with self._changed:
            left = min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
            self._changed.wait_for(lambda: self._ended or self._woken, left)
            ended, self._ended, self._woken = self._ended, [], False
            return ended

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()
