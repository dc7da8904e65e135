"""The progress engine: moves the bytes of all connections of one rank.

It has no thread of its own. A thread that waits for its transfers drives all sockets. When several
threads wait (asynchronous operations, overlapping groups), one of them drives, and the others
sleep until their transfers have ended or the driver has left.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from ferro.collectives.label import context_of, in_context
from ferro_gloo.tcp.connection import Connection, ReadEvents
from ferro_gloo.tcp.matching import PostedReceive, TransferBatch
from ferro_gloo.tcp.posted_batches import EndedBatches, PostedBatch
from ferro_gloo.tcp.protocol import ABORT, DeadlinePassedError, GroupAbortedError, LabelMismatchError

# A signal that comes just before a wait begins does not end it, and its handler runs only afterwards.
_LONGEST_WAIT_S = 0.2
_READ_FIRST_BYTES = 16 << 10
# How many bytes of frames are kept until their receives are posted, from all peers together. Long transfers wait for
# their receives (see `TcpBackend.exchange`), so only very many short ones reach this limit.
KEPT_LIMIT_BYTES = 1 << 30

_engines: weakref.WeakSet[ProgressEngine] = weakref.WeakSet()


class ProgressEngine:
    """The connections of one rank to each other rank of the world."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._aborted: set[int] = set()
        self._connections = {
            peer: Connection(sock, peer, self._aborted, KEPT_LIMIT_BYTES // len(sockets))
            for peer, sock in sockets.items()
        }
        # Threads enter the lock itself, since an exception inside Condition.__enter__ would leave it locked. It is an
        # RLock because the garbage collector may drop a group, which calls `wake`, in a thread that has the lock.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._driving = False
        self._polling = False
        self._failures: dict[int, Exception] = {}
        self._current_calls: dict[int, tuple[int, bytes]] = {}
        self._poll = select.poll()
        self._registered: dict[int, int] = {}
        self._by_fd = {c.sock.fileno(): c for c in self._connections.values()}
        self._wakeup_out, self._wakeup_in = socket.socketpair()
        self._wakeup_out.setblocking(False)
        self._wakeup_in.setblocking(False)
        self._poll.register(self._wakeup_in, select.POLLIN)
        self._closed = self._interrupted = False
        _engines.add(self)

    def begin_collective(self, tag: int, label: bytes) -> None:
        """Begin a collective: frames with its tag must carry its label from now on.

        Raises:
            LabelMismatchError: a frame with this tag and another label has come already.
        """
        context = context_of(tag)
        with self._lock:
            self._current_calls[context] = (tag, label)
            for connection in self._connections.values():
                connection.drop_before(tag)
                unexpected = connection.unexpected_label(tag)
                if unexpected is not None and unexpected != label:
                    raise LabelMismatchError(connection.peer, label, unexpected)

    def exchange(
        self,
        sends: Sequence[tuple[int, bytes, memoryview]],
        recvs: Sequence[tuple[int, bytes, memoryview]],
        tag: int,
        deadline: float,
    ) -> None:
        """Carry out all transfers, and return when the last has ended.

        Args:
            sends: (peer, header, body) of each frame that goes out.
            recvs: (peer, expected label, memory) of each frame that comes in.
            tag: the tag of all of them.
            deadline: absolute `time.monotonic()` second.

        Raises:
            TimeoutError, and the errors of `protocol`.
        """
        batch = TransferBatch(context_of(tag), len(sends) + len(recvs))
        with self._lock:
            self._begin(sends, recvs, tag, batch)
            self._wait(batch, deadline)

    def post(
        self,
        sends: Sequence[tuple[int, bytes, memoryview]],
        recvs: Sequence[tuple[int, bytes, memoryview]],
        tag: int,
        batch: TransferBatch,
    ) -> None:
        """Begin transfers that are awaited by `wait_for_batches`."""
        with self._lock:
            self._begin(sends, recvs, tag, batch)

    def wait_for_batches(self, ended: EndedBatches, until: float) -> list[PostedBatch]:
        """Wait until batches have ended, `wake` is called or the time has come; take and return the ended ones."""
        with self._lock:
            with suppress(DeadlinePassedError):
                self._wait(ended, until)
            batches, ended.batches, ended.woken = ended.batches, [], False
            return batches

    def wake(self, ended: EndedBatches) -> None:
        """End a wait in `wait_for_batches`, or the next one."""
        with self._lock:
            ended.woken = True
            self._wake()
            self._condition.notify_all()

    def _begin(
        self,
        sends: Sequence[tuple[int, bytes, memoryview]],
        recvs: Sequence[tuple[int, bytes, memoryview]],
        tag: int,
        batch: TransferBatch,
    ) -> None:
        """Post receives and send what the sockets take; lock held."""
        touched: set[Connection] = set()
        try:
            for peer, label, memory in recvs:
                self._connections[peer].post(tag, PostedReceive(memory, label, batch))
                touched.add(self._connections[peer])
            for peer, header, body in sends:
                touched.add(self._connections[peer])
                self._connections[peer].queue(header, body, batch)
            for connection in touched:
                connection.flush()
            if self._driving:
                if any(connection.sending for connection in touched):
                    self._wake()
            elif sum(memory.nbytes for _, _, memory in recvs) > _READ_FIRST_BYTES:
                # The first bytes of a long transfer have usually come already; for a short transfer a read costs more
                # than being woken by poll.
                read_events = ReadEvents()
                for connection in touched:
                    connection.read(read_events)
                self._apply(read_events)
        except BaseException:
            self._interrupt()
            raise

    def check(self, context: int, peers: Iterable[int]) -> None:
        """Read what has come, without waiting; raise if the group failed or a peer was lost.

        Raises:
            GroupAbortedError, ConnectionLostError.
        """
        with self._lock:
            if not self._driving and not self._closed:
                read_events = ReadEvents()
                for connection in self._connections.values():
                    connection.read(read_events)
                self._apply(read_events)
            failure = self._failures.get(context)
            if failure is not None:
                raise failure
            for peer in peers:
                lost = self._connections[peer].lost
                if lost is not None:
                    raise lost

    def abort(self, context: int, peers: Iterable[int]) -> None:
        """End a group's transfers: wake its threads on this rank, and tell its other ranks."""
        with self._lock:
            self._failures.setdefault(context, GroupAbortedError("the group was aborted on this rank"))
            for peer in peers:
                connection = self._connections.get(peer)
                if connection is not None:
                    connection.queue_control(0, ABORT, in_context(0, context))
                    connection.flush()
                    if self._interrupted:
                        with suppress(OSError):
                            connection.sock.shutdown(socket.SHUT_RDWR)
            self._drop_group(context)
            self._wake()
            self._condition.notify_all()

    def at_limit(self) -> tuple[list[int], list[int]]:
        """List the peers that have not received what this rank sent before, and those whose messages it has not."""
        with self._lock:
            connections = list(self._connections.values())
            slow = [connection.peer for connection in connections if connection.holds_back]
            return slow, [connection.peer for connection in connections if connection.is_offered_more]

    def close(self) -> None:
        """Close every connection and wake waiting threads; further calls do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for connection in self._connections.values():
                connection.flush()
                # The kernel resets a connection that is closed with unread data, and the peer could
                # lose what this rank sent last.
                connection.read(ReadEvents())
                connection.lose("", GroupAbortedError("this rank closed the group"))
                connection.sock.close()
            self._wake()
            self._condition.notify_all()
            if not self._driving:
                self._close_wakeup()

    def close_in_child(self) -> None:
        """Close a forked child's copies of the sockets, so that the end of its parent ends the connections.

        A thread that does not exist in the child may have held the lock.
        """
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._closed = True
        for connection in self._connections.values():
            connection.lose("", GroupAbortedError("this process was forked"))
            connection.sock.close()
        self._close_wakeup()

    def _close_wakeup(self) -> None:
        self._wakeup_in.close()
        self._wakeup_out.close()

    def _wait(self, batch: TransferBatch, deadline: float) -> None:
        """Drive until `batch` has ended, or sleep while another thread drives; lock held."""
        while not self._ended(batch):
            if self._closed:
                raise GroupAbortedError("this rank closed the group")
            if self._driving:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlinePassedError("the deadline passed")
                self._condition.wait(min(left, _LONGEST_WAIT_S))
                continue
            self._driving = True
            try:
                self._drive(batch, deadline)
            finally:
                self._driving = False
                self._condition.notify_all()
                if self._closed:
                    self._close_wakeup()

    def _ended(self, batch: TransferBatch) -> bool:
        """Return True when all transfers have ended; raise if one or the group failed."""
        if batch.error is not None:
            raise batch.error
        failure = self._failures.get(batch.context)
        if failure is not None:
            raise failure
        return batch.remaining == 0

    def _drive(self, batch: TransferBatch, deadline: float) -> None:
        """Move all connections' bytes until `batch` has ended; lock held except in `poll`."""
        while not batch.ended and batch.context not in self._failures:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlinePassedError("the deadline passed")
            self._update_registrations()
            self._polling = True
            try:
                self._lock.release()
                events = self._poll.poll(min(left, _LONGEST_WAIT_S) * 1000 + 1)
            finally:
                self._lock.acquire()
                self._polling = False
            if self._closed:
                return
            try:
                self._move_bytes(events)
            except BaseException:
                self._interrupt()
                raise
            self._condition.notify_all()

    def _move_bytes(self, events: Sequence[tuple[int, int]]) -> None:
        """Flush and read the connections that are ready."""
        read_events = ReadEvents()
        for fd, event in events:
            connection = self._by_fd.get(fd)
            if connection is None:
                self._drain_wakeup()
                continue
            if event & (select.POLLOUT | select.POLLERR | select.POLLHUP):
                connection.flush()
            if event & ~select.POLLOUT:
                connection.read(read_events)
        self._apply(read_events)

    def _interrupt(self) -> None:
        """Give up all connections: an interrupt came while bytes moved that may not have been counted.

        The peers are told when the group is aborted, so that they find the cause.
        """
        self._interrupted = True
        for connection in self._connections.values():
            connection.lose("this rank was interrupted in the middle of a message")

    def _update_registrations(self) -> None:
        for fd, connection in self._by_fd.items():
            wanted = 0
            if connection.lost is None:
                wanted = select.POLLIN | select.POLLOUT if connection.sending else select.POLLIN
            if self._registered.get(fd, 0) != wanted:
                if wanted:
                    self._poll.register(fd, wanted)
                else:
                    self._poll.unregister(fd)
                self._registered[fd] = wanted

    def _apply(self, read_events: ReadEvents) -> None:
        """Record the aborted groups and the label mismatches that reading has found."""
        for tag in read_events.aborted:
            context = context_of(tag)
            self._failures.setdefault(context, GroupAbortedError("another rank aborted the group"))
            self._drop_group(context)
        for peer, tag, label in read_events.unexpected:
            active = self._current_calls.get(context_of(tag))
            if active is not None and active[0] == tag and active[1] != label:
                error = LabelMismatchError(peer, active[1], label)
                self._failures.setdefault(context_of(tag), error)

    def _drop_group(self, context: int) -> None:
        self._aborted.add(context)
        for connection in self._connections.values():
            connection.drop_group(context)

    def _wake(self) -> None:
        if self._polling:
            try:
                self._wakeup_out.send(b"w")
            except BlockingIOError:
                return  # enough bytes to wake it are in the socket already

    def _drain_wakeup(self) -> None:
        try:
            self._wakeup_in.recv(4096)
        except BlockingIOError:
            return


def _close_copies() -> None:
    for engine in list(_engines):
        engine.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
