"""Connection: the frames that go out of and come into one peer's socket.

Outgoing frames are queued as header and user memory, and never copied. Incoming bodies are read straight into the
memory posted for them. A frame that comes before its receive is posted (an unexpected message in MPI's terms) is kept,
up to a limit of bytes in all; beyond it the socket is not read until receives are posted.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice

from ferro.collectives.label import collective_tag, context_of, in_context
from ferro_gloo.tcp.protocol import (
    ABORT,
    DATA,
    HEADER_BYTES,
    MAX_BODY,
    ConnectionLostError,
    LabelMismatchError,
    LengthMismatchError,
    unpack,
)

_READ_AHEAD_BYTES = 16 << 10  # so that one system call reads a header and a small body
_FRAMES_PER_CALL = 8


class TransferBatch:
    """Transfers that one thread waits for together.

    Attributes:
        context: the number of their group.
        remaining: how many transfers have not ended.
        error: the first error, or None.
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
        """True when no transfer remains or one has failed."""
        return self.remaining == 0 or self.error is not None


@dataclass(slots=True)
class PostedReceive:
    """Memory posted for the next frame with a tag."""

    body: memoryview
    label: bytes
    batch: TransferBatch


@dataclass(slots=True)
class _IncomingFrame:
    """A frame whose header has been read; `remaining` bytes of its body are still to come."""

    tag: int
    label: bytes
    body: memoryview
    remaining: int
    receive: PostedReceive | None
    unexpected: bool = False


@dataclass(slots=True)
class ReadEvents:
    """The tags of the aborts, and (peer, tag, label) of the unexpected frames, that were read."""

    aborted: list[int] = field(default_factory=list)
    unexpected: list[tuple[int, int, bytes]] = field(default_factory=list)


class Connection:
    """One non-blocking socket of the mesh. It is not thread-safe: the engine holds its lock."""

    def __init__(self, sock: socket.socket, peer: int, aborted: Set[int], unexpected_limit: int) -> None:
        """Take ownership of a socket.

        Args:
            sock: connected and authenticated.
            peer: the rank at the other end.
            aborted: the groups whose frames are dropped; the engine adds to it.
            unexpected_limit: how many unexpected bytes are kept before reading stops.
        """
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self._aborted = aborted
        self._unexpected_limit = unexpected_limit
        self.lost: Exception | None = None
        self.posted: dict[int, deque[PostedReceive]] = {}
        self._unexpected: dict[int, deque[_IncomingFrame]] = {}
        self._unexpected_bytes = 0
        self._out: deque[tuple[list[memoryview], TransferBatch | None]] = deque()
        self._read_buffer = memoryview(bytearray(HEADER_BYTES + _READ_AHEAD_BYTES))
        self._buffered = 0
        self._incoming: _IncomingFrame | None = None

    @property
    def sending(self) -> bool:
        """True while frames wait to go out."""
        return bool(self._out)

    @property
    def readable(self) -> bool:
        """True unless the connection is lost or has reached its limit of unexpected bytes."""
        return self.lost is None and self._unexpected_bytes < self._unexpected_limit

    def queue(self, header: bytes, body: memoryview, batch: TransferBatch | None) -> None:
        """Append a frame to the outgoing queue."""
        if self.lost is not None:
            if batch is not None:
                batch.fail(self.lost)
            return
        parts = [memoryview(header), body] if body.nbytes else [memoryview(header)]
        self._out.append((parts, batch))

    def post(self, tag: int, receive: PostedReceive) -> None:
        """Post memory for the next frame with this tag, which may have come already."""
        waiting = self._unexpected.get(tag)
        if waiting:
            frame = waiting.popleft()
            if not waiting:
                del self._unexpected[tag]
            self._unexpected_bytes -= len(frame.body)
            self._deliver_unexpected(frame, receive)
        elif self.lost is not None:
            receive.batch.fail(self.lost)
        else:
            self.posted.setdefault(tag, deque()).append(receive)

    def unexpected_label(self, tag: int) -> bytes | None:
        """Return the label of the first unexpected frame with this tag, or None."""
        waiting = self._unexpected.get(tag)
        return waiting[0].label if waiting else None

    def drop(self, tags: list[int]) -> None:
        """Drop posted receives and unexpected frames with these tags."""
        for tag in tags:
            self.posted.pop(tag, None)
            for unexpected in self._unexpected.pop(tag, ()):
                self._unexpected_bytes -= len(unexpected.body)
        frame = self._incoming
        if frame is not None and frame.tag in tags and frame.receive is not None:
            # The caller owns its memory again, so the rest of the frame must not be written there.
            frame.receive = None
            if not frame.unexpected:
                frame.body = memoryview(bytearray(len(frame.body)))

    def drop_before(self, tag: int) -> None:
        """Drop unexpected frames of this group's earlier collectives: no receive will come."""
        if self._unexpected:
            first = in_context(collective_tag(0), context_of(tag))
            self.drop([old for old in self._unexpected if first <= old < tag])

    def tags(self) -> list[int]:
        """Return the tags of all posted receives, unexpected frames and the incoming frame."""
        arriving = [] if self._incoming is None else [self._incoming.tag]
        return [*self.posted, *self._unexpected, *arriving]

    def flush(self) -> None:
        """Send as much as the socket takes."""
        while self._out and self.lost is None:
            parts = [part for item in islice(self._out, _FRAMES_PER_CALL) for part in item[0]]
            try:
                count = self.sock.sendmsg(parts)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno is None:
                    raise  # it comes from a signal handler of the program
                self.lose(f"sending failed: {error}")
                return
            self._remove_sent(count)

    def _remove_sent(self, count: int) -> None:
        while count:
            parts, batch = self._out[0]
            while parts and count >= parts[0].nbytes:
                count -= parts[0].nbytes
                parts.pop(0)
            if parts:
                parts[0] = parts[0][count:]
                return
            self._out.popleft()
            if batch is not None:
                batch.remaining -= 1

    def read(self, events: ReadEvents) -> None:
        """Read and parse all that has come."""
        try:
            while self.readable:
                frame = self._incoming
                if frame is None:
                    room = self._read_buffer[self._buffered :]
                    count = self.sock.recv_into(room)
                    self._buffered += count
                else:
                    room = frame.body[len(frame.body) - frame.remaining :]
                    count = self.sock.recv_into(room)
                    frame.remaining -= count
                if count == 0:
                    self.lose("it closed the connection")
                    return
                self._parse(events)
                if count < room.nbytes and self._incoming is None:
                    return  # the socket is empty, and no frame is incomplete
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno is None:
                raise  # it comes from a signal handler of the program
            self.lose(f"receiving failed: {error}")

    def lose(self, reason: str, error: Exception | None = None) -> None:
        """Mark the connection as lost; all its transfers fail with `error`."""
        if self.lost is not None:
            return
        self.lost = error or ConnectionLostError(self.peer, reason)
        for receives in self.posted.values():
            for receive in receives:
                receive.batch.fail(self.lost)
        self.posted.clear()
        for _, batch in self._out:
            if batch is not None:
                batch.fail(self.lost)
        self._out.clear()
        frame = self._incoming
        if frame is not None and frame.receive is not None:
            frame.receive.batch.fail(self.lost)

    def _parse(self, events: ReadEvents) -> None:
        """Complete the incoming frame, then parse the frames in the read buffer."""
        if self._incoming is not None and self._incoming.remaining == 0:
            self._complete_frame()
        position = 0
        while self._incoming is None and self._buffered - position >= HEADER_BYTES:
            self._begin_frame(self._read_buffer[position : self._buffered], events)
            position += HEADER_BYTES
            if self.lost is not None:
                return
            position += self._fill_body(self._read_buffer[position : self._buffered])
        left = self._buffered - position
        if position and left:
            self._read_buffer[:left] = self._read_buffer[position : self._buffered].tobytes()
        self._buffered = left

    def _begin_frame(self, data: memoryview, events: ReadEvents) -> None:
        """Parse a header; find the memory for its body."""
        length, kind, tag, label = unpack(data)
        if length > MAX_BODY or kind not in (DATA, ABORT):
            self.lose(f"it sent a frame of kind {kind} and {length} bytes, which is none of ours")
            return
        if kind == ABORT:
            events.aborted.append(tag)
            return
        receive = self._pop_posted(tag)
        if receive is None and context_of(tag) not in self._aborted:
            body = memoryview(bytearray(length))
            self._incoming = _IncomingFrame(tag, label, body, length, None, unexpected=True)
            self._unexpected.setdefault(tag, deque()).append(self._incoming)
            self._unexpected_bytes += length
            events.unexpected.append((self.peer, tag, label))
            return
        if receive is not None:
            error = self._check_frame(receive, label, length)
            if error is not None:
                receive.batch.fail(error)
                receive = None
        body = receive.body if receive is not None else memoryview(bytearray(length))
        self._incoming = _IncomingFrame(tag, label, body, length, receive)

    def _pop_posted(self, tag: int) -> PostedReceive | None:
        receives = self.posted.get(tag)
        if not receives:
            return None
        receive = receives.popleft()
        if not receives:
            del self.posted[tag]
        return receive

    def _check_frame(self, receive: PostedReceive, label: bytes, length: int) -> Exception | None:
        if label != receive.label:
            return LabelMismatchError(self.peer, receive.label, label)
        if length != receive.body.nbytes:
            return LengthMismatchError(self.peer, receive.body.nbytes, length)
        return None

    def _fill_body(self, data: memoryview) -> int:
        """Copy the part of a body that is in the read buffer; return its size."""
        frame = self._incoming
        if frame is None:
            return 0
        count = min(frame.remaining, len(data))
        if count:
            start = len(frame.body) - frame.remaining
            frame.body[start : start + count] = data[:count]
            frame.remaining -= count
        if frame.remaining == 0:
            self._complete_frame()
        return count

    def _complete_frame(self) -> None:
        frame, self._incoming = self._incoming, None
        assert frame is not None, "no frame is under way"
        receive = frame.receive
        if receive is None:
            return
        if frame.unexpected:
            receive.body[:] = frame.body
        receive.batch.remaining -= 1

    def _deliver_unexpected(self, frame: _IncomingFrame, receive: PostedReceive) -> None:
        """Give an unexpected frame, complete or not, to the receive posted for it."""
        error = self._check_frame(receive, frame.label, len(frame.body))
        if error is not None:
            receive.batch.fail(error)
        elif frame.remaining:
            frame.receive = receive
        else:
            receive.body[:] = frame.body
            receive.batch.remaining -= 1
