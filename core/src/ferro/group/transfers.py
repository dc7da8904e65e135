"""TransferQueue: the transfers of one group on one rank, each in its place in the order of its channels.

A channel is one peer, one direction and one tag; its messages move one after the other. A transfer takes its places in
all its channels at once, when it is issued. If it is first in all of them, it runs in the caller's thread. Other
transfers are carried out by one thread of the group, message by message: the two halves of a sendrecv do not wait for
each other, and any number of transfers may be outstanding.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any, TypeAlias

import numpy as np

from ferro.backend import Backend
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels, transfer_call
from ferro.collectives.posted_transfers import PostedTransfers, move_all
from ferro.errors import GroupClosed
from ferro.group.serial_executor import (
    IDLE_S,
    SHORT_SWITCH_INTERVAL,
    ExecutorClosed,
    enter_executor_thread,
    remaining_s,
    start_thread,
)
from ferro.group.work import Work
from ferro.observers import Event
from ferro.types import Array

Messages: TypeAlias = Sequence[tuple[int, Array]]  # (peer, buffer)
Channel: TypeAlias = tuple[str, int, int]  # "send" or "recv", peer, tag: its messages move in the order issued


class Half:
    """The message of a transfer on one channel.

    Attributes:
        offered: it is first in its channel, and the thread that carries it out was told so.
        stages: the buffers that move on the channel, one after the other; None before the first.
    """

    __slots__ = ("buffer", "channel", "deadline", "offered", "stages", "transfer")

    def __init__(self, transfer: Transfer, direction: str, peer: int, tag: int, buffer: Array) -> None:
        self.transfer = transfer
        self.channel: Channel = (direction, peer, tag)
        self.buffer = buffer
        self.deadline = 0.0
        self.offered = False
        self.stages: Iterator[Array] | None = None

    def messages(self, backend: Backend) -> Iterator[Array]:
        """Give what moves on the channel: the buffer, after its label where the backend's frames carry none."""
        if not backend.labels_frames:
            call = transfer_call(self.buffer)
            if self.channel[0] == "send":
                yield np.frombuffer(call.label(), np.uint8)
            else:
                label = np.empty(LABEL_BYTES, np.uint8)
                yield label
                compare_labels(backend.rank, call, self.channel[1], label.tobytes())
        yield self.buffer


class Transfer:
    """A send, a receive, both, or many of them at once: one half for each message.

    The group's thread calls `begin` before anything moves; it may raise. `end`, given the error or None, returns the
    caller's result or raises the caller's error. Until the transfer has `begun` it may be withdrawn.
    """

    __slots__ = ("begin", "begun", "call", "end", "event", "halves", "left", "started", "timeout_s", "turn", "work")

    def __init__(
        self,
        op: str,
        sends: Messages,
        recvs: Messages,
        tag: int,
        timeout_s: float,
        begin: Callable[[Transfer], None],
        end: Callable[[Transfer, BaseException | None], Any],
    ) -> None:
        self.call = Call(op)
        self.timeout_s = timeout_s
        self.begin, self.end = begin, end
        self.halves = [Half(self, "send", peer, tag, buffer) for peer, buffer in sends]
        self.halves += [Half(self, "recv", peer, tag, buffer) for peer, buffer in recvs]
        self.left = len(self.halves)
        self.begun = False
        self.started = 0.0
        self.event: Event | None = None
        self.turn: threading.Lock | None = None  # of a transfer that waits in the caller's thread: locked meanwhile
        self.work: Work[Any] | None = None  # of a transfer in the group's thread

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(half.channel[1] for half in self.halves))

    @property
    def nbytes(self) -> int:
        return sum(half.buffer.nbytes for half in self.halves)

    def numbered(self, seq: int) -> Call:
        self.call.seq = seq
        return self.call

    def describe(self) -> str:
        """Say which messages move between which ranks, for other ranks' messages."""
        return ", ".join(
            f"{half.buffer.nbytes} bytes {'to' if half.channel[0] == 'send' else 'from'} "
            f"rank {half.channel[1]}, tag {half.channel[2]}"
            for half in self.halves
        )

    def move(self, backend: Backend, *, deadline: float) -> None:
        """Move its messages in this thread."""
        if not self.halves:
            return
        (direction, peer, tag), buffer = self.halves[0].channel, self.halves[0].buffer
        if len(self.halves) == 1:
            move = backend.send if direction == "send" else backend.recv
            if backend.labels_frames:
                move(buffer, peer, tag=tag, deadline=deadline)
                return
            for message in self.halves[0].messages(backend):
                move(message, peer, tag=tag, deadline=deadline)
            return
        if backend.labels_frames:
            messages: dict[str, list[tuple[int, Array]]] = {"send": [], "recv": []}
            for half in self.halves:
                messages[half.channel[0]].append((half.channel[1], half.buffer))
            backend.exchange(messages["send"], messages["recv"], tag=tag, deadline=deadline)
            return
        channels: dict[tuple[str, int], list[Iterator[Array]]] = {}
        for half in self.halves:
            channels.setdefault(half.channel[:2], []).append(half.messages(backend))
        chained = {channel: chain.from_iterable(parts) for channel, parts in channels.items()}
        move_all(backend.posted_transfers(), chained, tag, deadline)

    def conclude(self, error: BaseException | None) -> None:
        """Give its result, or the caller's error, to those who wait for it; later errors change nothing."""
        work = self.work
        if work is not None and not work.done():
            work._run(lambda _: self.end(self, error))

    def release(self) -> None:
        """Let go of what it moved and of its group, which a circle of references would keep alive until the next gc."""
        self.halves = []


class TransferQueue:
    """The outstanding transfers of one group on one rank."""

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend = backend
        self._name = name
        # Callers enter the lock itself, since an exception inside Condition.__enter__ would leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._channels: dict[Channel, deque[Half]] = {}
        self._ready: list[Half] = []  # for the group's thread to begin
        self._moving: dict[Half, None] = {}  # begun by it
        self._deadlines: list[tuple[float, int, Half]] = []  # a heap
        self._order = count()
        self._posted: PostedTransfers | None = None
        self._thread: threading.Thread | None = None
        self._closed = self._failed = False

    def run(self, transfer: Transfer, operation: Callable[[int], Any], *, in_this_thread: bool) -> Any:
        """Run `operation`, given its number, in the transfer's turn.

        A transfer whose halves have different turns goes to the group's thread, unless `in_this_thread`.

        Raises:
            ExecutorClosed: the group is closed.
        """
        with self._lock:
            seq = self._take_places(transfer)
            if not (self._failed or self._is_first(transfer)):
                if in_this_thread or transfer.left == 1:
                    transfer.turn = threading.Lock()
                    transfer.turn.acquire()
                else:
                    self._hand_over(transfer, seq)
        if transfer.work is not None:
            return transfer.work.wait()
        if transfer.turn is not None:
            transfer.turn.acquire()
        transfer.begun = True
        try:
            return operation(seq)
        finally:
            with self._lock:
                self._leave(transfer.halves)

    def start(self, transfer: Transfer) -> Work[Any]:
        """Give a transfer to the group's thread.

        Raises:
            ExecutorClosed: the group is closed.
            ThreadLimitError: there is no such thread, and none can be started.
        """
        with self._lock:
            self._hand_over(transfer, self._take_places(transfer))
        assert transfer.work is not None
        return transfer.work

    def withdraw(self, transfer: Transfer) -> bool:
        """Take back a transfer, unless some of it may have moved; say whether it was."""
        with self._lock:
            if not transfer.begun:
                self._ready = [half for half in self._ready if half.transfer is not transfer]
                self._leave(transfer.halves)
            return not transfer.begun

    def fail(self) -> None:
        """End all transfers: the group is dead."""
        with self._lock:
            self._failed = True
            for half in [half for channel in self._channels.values() for half in channel]:
                self._offer(half)
            self._wake()

    def close(self, deadline: float) -> bool:
        """Take no more transfers; say whether the issued ones have ended by the deadline."""
        with self._lock:
            self._closed = True
            self._wake()
            return self._changed.wait_for(lambda: not self._channels, remaining_s(deadline))

    # -- channels; the caller holds the lock -------------------------------------------------------

    def _take_places(self, transfer: Transfer) -> int:
        """Append the halves to their channels; return the number of transfers ahead in the first one."""
        if self._closed:
            raise ExecutorClosed(transfer.call.op)
        for half in transfer.halves:
            self._channels.setdefault(half.channel, deque()).append(half)
        return len(self._channels[transfer.halves[0].channel]) - 1 if transfer.halves else 0

    def _hand_over(self, transfer: Transfer, seq: int) -> None:
        if self._thread is None:
            try:
                self._thread = start_thread(self._carry_out, f"ferro-{self._name}-transfers")
            except BaseException:
                self._leave(transfer.halves)
                raise
        transfer.call.seq = seq
        transfer.work = Work(transfer.call.op, seq)
        for half in transfer.halves:
            if self._channels[half.channel][0] is half:
                self._offer(half)

    def _is_first(self, transfer: Transfer) -> bool:
        return all(self._channels[half.channel][0].transfer is transfer for half in transfer.halves)

    def _offer(self, half: Half) -> None:
        """Let a half that is first in its channel begin, or a transfer that waits in the caller's thread."""
        turn = half.transfer.turn
        if half.offered:
            return
        if turn is None:
            if half.transfer.work is not None:
                half.offered = True
                self._ready.append(half)
                self._wake()
        elif self._failed or self._is_first(half.transfer):
            for each in half.transfer.halves:
                each.offered = True
            turn.release()

    def _leave(self, halves: Sequence[Half]) -> None:
        for half in halves:
            channel = self._channels.get(half.channel)
            if channel is not None and half in channel:
                channel.remove(half)
                if channel:
                    self._offer(channel[0])
                else:
                    del self._channels[half.channel]
        if self._closed and not self._channels:
            self._changed.notify_all()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._posted is not None:
            self._posted.wake()

    # -- the group's thread ------------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Carry out transfers as they come, until there have been none for a while or the queue is closed."""
        enter_executor_thread()
        while (ready := self._next_halves()) is not None:
            with SHORT_SWITCH_INTERVAL:
                while ready:  # no variable of this thread keeps a transfer, and its group, when they are done
                    self._advance(ready.pop(0), None)
                if self._moving:
                    self._await_some()

    def _next_halves(self) -> list[Half] | None:
        """Wait for halves to begin or for some that move; None ends the thread."""
        with self._lock:
            if not self._moving:
                self._deadlines.clear()  # what is done would keep a dropped group alive, and with it this thread
            while not self._ready and not self._moving:
                if self._thread is not threading.current_thread():
                    return None  # an interrupt came while this thread was started, and there may be another
                # A transfer of this thread may wait for one that a caller's thread carries out.
                if not self._channels and (self._closed or not self._changed.wait(IDLE_S)) and not self._channels:
                    self._thread = None
                    return None
                if self._channels and not self._ready:
                    self._changed.wait()
            ready, self._ready = self._ready, []
            for half in ready:
                half.transfer.begun = True
            return ready

    def _advance(self, half: Half, error: BaseException | None) -> None:
        """Begin the next message of a half, or end the half."""
        transfer = half.transfer
        if error is None:
            try:
                if half.stages is None:
                    half.stages = half.messages(self._backend)
                    half.deadline = time.monotonic() + transfer.timeout_s
                    if not transfer.started:
                        transfer.started = time.monotonic()
                        transfer.begin(transfer)
                    heapq.heappush(self._deadlines, (half.deadline, next(self._order), half))
                if (buffer := next(half.stages, None)) is not None:
                    self._move(half, buffer)
                    return
            except BaseException as raised:  # noqa: BLE001 - the transfer's Work raises it
                error = raised
        self._moving.pop(half, None)
        if error is not None:  # before the next half in the channel begins, the group is dead
            enter_executor_thread(transfer.work.thread if transfer.work is not None else 0)
            transfer.conclude(error)
        with self._lock:
            self._leave([half])
        transfer.left -= 1
        if not transfer.left:
            transfer.conclude(None)
            transfer.release()

    def _move(self, half: Half, buffer: Array) -> None:
        if self._posted is None:
            posted = self._backend.posted_transfers()
            with self._lock:
                self._posted = posted
                if self._ready:  # they came when there was nothing to wake yet
                    posted.wake()
        direction, peer, tag = half.channel
        post = self._posted.isend if direction == "send" else self._posted.irecv
        self._moving[half] = None
        post(half, buffer, peer, tag=tag, deadline=half.deadline)

    def _await_some(self) -> None:
        """Wait until messages have moved; end transfers whose deadline has passed, and all if the group is dead."""
        assert self._posted is not None
        while self._deadlines and self._deadlines[0][2] not in self._moving:
            heapq.heappop(self._deadlines)
        if not self._failed:
            try:
                for handle, error in self._posted.wait_any(self._deadlines[0][0]):
                    if handle in self._moving:
                        self._advance(handle, error)
            except BaseException as error:  # noqa: BLE001 - each Work raises it
                for half in list(self._moving):
                    self._advance(half, error)
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            half = heapq.heappop(self._deadlines)[2]
            if half in self._moving:
                self._advance(half, TimeoutError("the deadline passed"))
        if self._failed:
            for half in list(self._moving):
                self._advance(half, GroupClosed("the group is dead"))
