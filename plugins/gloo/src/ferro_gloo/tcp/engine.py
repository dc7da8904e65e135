"""Engine: drives all connections of one rank, for whichever thread is waiting.

There is no thread of its own. Whoever waits for transfers drives the sockets, for everybody's
transfers; when several threads wait (asynchronous operations, overlapping groups), one of them
drives and the others sleep until theirs have ended or it is their turn.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from ferro.collectives.label import LABEL_BYTES, context_of, in_context
from ferro_gloo.tcp.connection import (
    AbortedError,
    Connection,
    DiffersError,
    Inbox,
    Pending,
    Receive,
)
from ferro_gloo.tcp.frame import ABORT, pack

_LONGEST_POLL_S = 1.0
_EAGER_BYTES = 16 << 10
# What may come before its receive is posted, from all peers together. Long transfers wait for
# their receives (see `TcpBackend`), so this takes very many short ones.
EARLY_LIMIT = 1 << 30


class Engine:
    """The mesh of one rank: a connection to each other rank of the world."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._aborted: set[int] = set()
        self._connections = {
            peer: Connection(sock, peer, self._aborted, EARLY_LIMIT // len(sockets))
            for peer, sock in sockets.items()
        }
        self._turn = threading.Condition(threading.Lock())
        self._driving = False
        self._polling = False
        self._failures: dict[int, Exception] = {}
        self._active: dict[int, tuple[int, bytes]] = {}
        self._poll = select.poll()
        self._interest: dict[int, int] = {}
        self._by_fd = {c.sock.fileno(): c for c in self._connections.values()}
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._poll.register(self._wake_in, select.POLLIN)
        self._closed = False

    def activate(self, tag: int, label: bytes) -> None:
        """Begin a collective: from now on frames with its tag must carry its label.

        Raises:
            DiffersError: a frame of another call with this tag has come already.
        """
        context = context_of(tag)
        with self._turn:
            self._active[context] = (tag, label)
            for connection in self._connections.values():
                connection.forget_before(tag)
                early = connection.early_label(tag)
                if early is not None and early != label:
                    raise DiffersError(connection.peer, label, early)

    def exchange(
        self,
        sends: Sequence[tuple[int, bytes, memoryview]],
        recvs: Sequence[tuple[int, bytes, memoryview]],
        tag: int,
        deadline: float,
    ) -> None:
        """Do all transfers; return when the last has ended.

        Args:
            sends: (peer, header, body) of each frame that goes out.
            recvs: (peer, expected label, memory) of each frame that comes in.
            tag: the tag of all of them.
            deadline: absolute `time.monotonic()` second.

        Raises:
            TimeoutError, and the errors of `connection`.
        """
        pending = Pending(context_of(tag), len(sends) + len(recvs))
        with self._turn:
            touched = set()
            for peer, label, memory in recvs:
                self._connections[peer].post(tag, Receive(memory, label, pending))
                touched.add(self._connections[peer])
            for peer, header, body in sends:
                self._connections[peer].queue(header, body, pending)
                touched.add(self._connections[peer])
            for connection in touched:
                connection.flush()
            if self._driving:
                if any(connection.sending for connection in touched):
                    self._wake()
            elif sum(memory.nbytes for _, _, memory in recvs) > _EAGER_BYTES:
                # Of much that is to come something mostly has; to look for little costs more than
                # being woken.
                inbox = Inbox()
                for connection in touched:
                    connection.read(inbox)
                self._note(inbox)
            self._wait(pending, deadline)

    def look(self, context: int, peers: Iterable[int]) -> None:
        """Take in what has come, without waiting; raise what ended the group or lost a peer.

        Raises:
            AbortedError, LostError.
        """
        with self._turn:
            if not self._driving and not self._closed:
                inbox = Inbox()
                for connection in self._connections.values():
                    connection.read(inbox)
                self._note(inbox)
            failure = self._failures.get(context)
            if failure is not None:
                raise failure
            for peer in peers:
                lost = self._connections[peer].lost
                if lost is not None:
                    raise lost

    def abort(self, context: int, peers: Iterable[int]) -> None:
        """End a group's transfers: wake its waiting threads here, and tell its other ranks."""
        header = pack(0, ABORT, in_context(0, context), bytes(LABEL_BYTES))
        with self._turn:
            self._failures.setdefault(context, AbortedError("the group was aborted on this rank"))
            for peer in peers:
                connection = self._connections.get(peer)
                if connection is not None:
                    connection.queue(header, memoryview(b""), None)
                    connection.flush()
            self._forget(context)
            self._wake()
            self._turn.notify_all()

    def close(self) -> None:
        """Close every connection; waiting threads are woken. Idempotent."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            for connection in self._connections.values():
                connection.flush()
                # Closing with unread data would reset the connection, and the peer could lose
                # what was sent last.
                connection.read(Inbox())
                connection.lose("", AbortedError("this rank closed the group"))
                connection.sock.close()
            self._wake()
            self._turn.notify_all()
            if not self._driving:
                self._release()

    def _release(self) -> None:
        self._wake_in.close()
        self._wake_out.close()

    def _wait(self, pending: Pending, deadline: float) -> None:
        """Drive until `pending` has ended, or sleep while another thread does. Lock held."""
        while not self._ended(pending):
            if self._driving:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the deadline passed")
                self._turn.wait(left)
                continue
            self._driving = True
            try:
                self._drive(pending, deadline)
            finally:
                self._driving = False
                self._turn.notify_all()
                if self._closed:
                    self._release()

    def _ended(self, pending: Pending) -> bool:
        """Say whether all transfers have ended well; raise if they have not."""
        if pending.error is not None:
            raise pending.error
        failure = self._failures.get(pending.context)
        if failure is not None:
            raise failure
        return pending.remaining == 0

    def _drive(self, pending: Pending, deadline: float) -> None:
        """Move everybody's bytes until `pending` has ended. Lock held, but for the polls."""
        while not pending.ended and pending.context not in self._failures:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the deadline passed")
            self._update_interest()
            self._polling = True
            self._turn.release()
            try:
                events = self._poll.poll(min(left, _LONGEST_POLL_S) * 1000 + 1)
            finally:
                self._turn.acquire()
                self._polling = False
            if self._closed:
                return
            inbox = Inbox()
            for fd, event in events:
                connection = self._by_fd.get(fd)
                if connection is None:
                    self._drain_wake()
                    continue
                if event & (select.POLLOUT | select.POLLERR | select.POLLHUP):
                    connection.flush()
                if event & ~select.POLLOUT:
                    connection.read(inbox)
            self._note(inbox)
            self._turn.notify_all()

    def _update_interest(self) -> None:
        for fd, connection in self._by_fd.items():
            wanted = 0
            if connection.readable:
                wanted |= select.POLLIN
            if connection.sending:
                wanted |= select.POLLOUT
            if self._interest.get(fd, 0) != wanted:
                if wanted:
                    self._poll.register(fd, wanted)
                else:
                    self._poll.unregister(fd)
                self._interest[fd] = wanted

    def _note(self, inbox: Inbox) -> None:
        """Act on what reading brought besides the bodies that were waited for."""
        for tag in inbox.aborted:
            context = context_of(tag)
            self._failures.setdefault(context, AbortedError("another rank aborted the group"))
            self._forget(context)
        for peer, tag, label in inbox.early:
            active = self._active.get(context_of(tag))
            if active is not None and active[0] == tag and active[1] != label:
                error = DiffersError(peer, active[1], label)
                self._failures.setdefault(context_of(tag), error)

    def _forget(self, context: int) -> None:
        self._aborted.add(context)
        for connection in self._connections.values():
            tags = [tag for tag in connection.tags() if context_of(tag) == context]
            connection.forget(tags)

    def _wake(self) -> None:
        if self._polling:
            try:
                self._wake_out.send(b"w")
            except BlockingIOError:
                return  # it is being woken already

    def _drain_wake(self) -> None:
        try:
            self._wake_in.recv(4096)
        except BlockingIOError:
            return
