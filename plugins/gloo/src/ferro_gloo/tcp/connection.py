"""Connection: one peer's socket, and what is on its way out of it and into it.

Outgoing frames are queued as they are, header and user memory, and never copied. Incoming
bodies go straight into the memory posted for them; a frame that comes before its receive is
posted ("early") is kept aside, up to a bound, beyond which the socket is not read until the
receives come.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice

from ferro.collectives.label import collective_tag, context_of, in_context
from ferro_gloo.tcp.frame import ABORT, DATA, HEADER_BYTES, MAX_BODY, unpack

_READ_AHEAD = 16 << 10  # read with a header: a small body comes with it in one system call
_FRAMES_PER_CALL = 8


class EngineError(Exception):
    """What the engine raises, with ranks of the world; the backend translates it."""


class LostError(EngineError):
    """The peer's connection is gone."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer


class DiffersError(EngineError):
    """The peer's frame carries another label than this rank's call."""

    def __init__(self, peer: int, expected: bytes, got: bytes) -> None:
        super().__init__("labels differ")
        self.peer = peer
        self.expected = expected
        self.got = got


class LengthError(EngineError):
    """The peer's frame has the right label, but another size."""

    def __init__(self, peer: int, expected: int, got: int) -> None:
        super().__init__(f"{got} bytes came where {expected} were expected")
        self.peer = peer


class AbortedError(EngineError):
    """The group was aborted, here or by the peer."""


class Pending:
    """Transfers that are waited for together.

    Attributes:
        context: the group that they belong to.
        remaining: how many have not ended.
        error: what went wrong, or None.
    """

    __slots__ = ("context", "error", "remaining")

    def __init__(self, context: int, remaining: int) -> None:
        self.context = context
        self.remaining = remaining
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Keep the first error."""
        if self.error is None:
            self.error = error

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.remaining == 0 or self.error is not None


@dataclass(slots=True)
class Receive:
    """Memory posted for the next frame with a tag."""

    body: memoryview
    label: bytes
    pending: Pending


@dataclass(slots=True)
class _Arrival:
    """A frame whose header has been read: where its body goes, and what is still to come."""

    tag: int
    label: bytes
    body: memoryview
    left: int
    receive: Receive | None
    early: bool = False


@dataclass(slots=True)
class Inbox:
    """What an engine is told by reading: groups that were aborted, frames that came early."""

    aborted: list[int] = field(default_factory=list)
    early: list[tuple[int, int, bytes]] = field(default_factory=list)


class Connection:
    """One socket of the mesh, non-blocking. Not thread-safe: the engine holds its lock."""

    def __init__(self, sock: socket.socket, peer: int, aborted: Set[int], early_limit: int) -> None:
        """Take a socket over.

        Args:
            sock: connected and authenticated.
            peer: whose it is.
            aborted: groups whose frames are of no use any more; the engine adds to it.
            early_limit: bytes that may come before their receives until reading stops.
        """
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self._aborted = aborted
        self._early_limit = early_limit
        self.lost: Exception | None = None
        self.posted: dict[int, deque[Receive]] = {}
        self._early: dict[int, deque[_Arrival]] = {}
        self._early_bytes = 0
        self._out: deque[tuple[list[memoryview], Pending | None]] = deque()
        self._ahead = memoryview(bytearray(HEADER_BYTES + _READ_AHEAD))
        self._have = 0
        self._arrival: _Arrival | None = None

    @property
    def sending(self) -> bool:
        """Whether frames wait to go out."""
        return bool(self._out)

    @property
    def readable(self) -> bool:
        """Whether the socket is to be read: not when lost, nor while too much came early."""
        return self.lost is None and self._early_bytes < self._early_limit

    def queue(self, header: bytes, body: memoryview, pending: Pending | None) -> None:
        """Append a frame to what goes out."""
        if self.lost is not None:
            if pending is not None:
                pending.fail(self.lost)
            return
        parts = [memoryview(header), body] if body.nbytes else [memoryview(header)]
        self._out.append((parts, pending))

    def post(self, tag: int, receive: Receive) -> None:
        """Give memory for the next frame with this tag; it may be there already."""
        waiting = self._early.get(tag)
        if waiting:
            arrival = waiting.popleft()
            if not waiting:
                del self._early[tag]
            self._early_bytes -= len(arrival.body)
            self._hand_over(arrival, receive)
        elif self.lost is not None:
            receive.pending.fail(self.lost)
        else:
            self.posted.setdefault(tag, deque()).append(receive)

    def early_label(self, tag: int) -> bytes | None:
        """Return the label of the first early frame with this tag, if there is one."""
        waiting = self._early.get(tag)
        return waiting[0].label if waiting else None

    def forget(self, context_tags: list[int]) -> None:
        """Drop everything that was posted or came early with these tags."""
        for tag in context_tags:
            self.posted.pop(tag, None)
            for early in self._early.pop(tag, ()):
                self._early_bytes -= len(early.body)
        arrival = self._arrival
        if arrival is not None and arrival.tag in context_tags and arrival.receive is not None:
            # The rest of the frame must not land in memory that its owner has back.
            arrival.receive = None
            if not arrival.early:
                arrival.body = memoryview(bytearray(len(arrival.body)))

    def forget_before(self, tag: int) -> None:
        """Drop early frames of the collectives before this one of its group: nobody will ask."""
        if self._early:
            first = in_context(collective_tag(0), context_of(tag))
            self.forget([old for old in self._early if first <= old < tag])

    def tags(self) -> list[int]:
        """Return all tags for which something is posted, came early or is arriving."""
        arriving = [] if self._arrival is None else [self._arrival.tag]
        return [*self.posted, *self._early, *arriving]

    def flush(self) -> bool:
        """Send what the socket takes; say whether anything went."""
        moved = False
        while self._out and self.lost is None:
            parts = [part for item in islice(self._out, _FRAMES_PER_CALL) for part in item[0]]
            try:
                count = self.sock.sendmsg(parts)
            except BlockingIOError:
                break
            except OSError as error:
                self.lose(f"sending failed: {error}")
                break
            moved = True
            self._sent(count)
        return moved

    def _sent(self, count: int) -> None:
        while count:
            parts, pending = self._out[0]
            while parts and count >= parts[0].nbytes:
                count -= parts[0].nbytes
                parts.pop(0)
            if parts:
                parts[0] = parts[0][count:]
                return
            self._out.popleft()
            if pending is not None:
                pending.remaining -= 1

    def read(self, inbox: Inbox) -> bool:
        """Take in what has come; say whether anything had."""
        moved = False
        try:
            while self.readable:
                arrival = self._arrival
                if arrival is None:
                    room = self._ahead[self._have :]
                    count = self.sock.recv_into(room)
                    self._have += count
                else:
                    room = arrival.body[len(arrival.body) - arrival.left :]
                    count = self.sock.recv_into(room)
                    arrival.left -= count
                if count == 0:
                    self.lose("it closed the connection")
                    return True
                moved = True
                self._take_in(inbox)
                if count < room.nbytes and self._arrival is None:
                    return True  # that was all, and no body is half here
        except BlockingIOError:
            return moved
        except OSError as error:
            self.lose(f"receiving failed: {error}")
            return True
        return moved

    def lose(self, reason: str, error: Exception | None = None) -> None:
        """Give up the connection; everything that waits for it fails with `error`."""
        if self.lost is not None:
            return
        self.lost = error or LostError(self.peer, reason)
        for receives in self.posted.values():
            for receive in receives:
                receive.pending.fail(self.lost)
        self.posted.clear()
        for _, pending in self._out:
            if pending is not None:
                pending.fail(self.lost)
        self._out.clear()
        arrival = self._arrival
        if arrival is not None and arrival.receive is not None:
            arrival.receive.pending.fail(self.lost)

    def _take_in(self, inbox: Inbox) -> None:
        """Go on with the frame under way, then with those that were read ahead."""
        if self._arrival is not None and self._arrival.left == 0:
            self._complete()
        position = 0
        while self._arrival is None and self._have - position >= HEADER_BYTES:
            self._begin(self._ahead[position : self._have], inbox)
            position += HEADER_BYTES
            if self.lost is not None:
                return
            position += self._fill(self._ahead[position : self._have])
        left = self._have - position
        if position and left:
            self._ahead[:left] = self._ahead[position : self._have].tobytes()
        self._have = left

    def _begin(self, data: memoryview, inbox: Inbox) -> None:
        """Read a header; find the memory for its body."""
        length, kind, tag, label = unpack(data)
        if length > MAX_BODY or kind not in (DATA, ABORT):
            self.lose(f"it sent a frame of kind {kind} and {length} bytes, which is none of ours")
            return
        if kind == ABORT:
            inbox.aborted.append(tag)
            return
        receive = self._next_receive(tag)
        if receive is None and context_of(tag) not in self._aborted:
            body = memoryview(bytearray(length))
            self._arrival = _Arrival(tag, label, body, length, None, early=True)
            self._early.setdefault(tag, deque()).append(self._arrival)
            self._early_bytes += length
            inbox.early.append((self.peer, tag, label))
            return
        if receive is not None:
            error = self._objection(receive, label, length)
            if error is not None:
                receive.pending.fail(error)
                receive = None
        body = receive.body if receive is not None else memoryview(bytearray(length))
        self._arrival = _Arrival(tag, label, body, length, receive)

    def _next_receive(self, tag: int) -> Receive | None:
        receives = self.posted.get(tag)
        if not receives:
            return None
        receive = receives.popleft()
        if not receives:
            del self.posted[tag]
        return receive

    def _objection(self, receive: Receive, label: bytes, length: int) -> Exception | None:
        if label != receive.label:
            return DiffersError(self.peer, receive.label, label)
        if length != receive.body.nbytes:
            return LengthError(self.peer, receive.body.nbytes, length)
        return None

    def _fill(self, data: memoryview) -> int:
        """Copy what was read ahead of a body into place; return how much that was."""
        arrival = self._arrival
        if arrival is None:
            return 0
        count = min(arrival.left, len(data))
        if count:
            start = len(arrival.body) - arrival.left
            arrival.body[start : start + count] = data[:count]
            arrival.left -= count
        if arrival.left == 0:
            self._complete()
        return count

    def _complete(self) -> None:
        arrival, self._arrival = self._arrival, None
        assert arrival is not None, "no frame is under way"
        receive = arrival.receive
        if receive is None:
            return
        if arrival.early:
            receive.body[:] = arrival.body
        receive.pending.remaining -= 1

    def _hand_over(self, arrival: _Arrival, receive: Receive) -> None:
        """Give an early frame, be it still arriving, to the receive that was posted for it."""
        error = self._objection(receive, arrival.label, len(arrival.body))
        if error is not None:
            receive.pending.fail(error)
        elif arrival.left:
            arrival.receive = receive
        else:
            receive.body[:] = arrival.body
            receive.pending.remaining -= 1
