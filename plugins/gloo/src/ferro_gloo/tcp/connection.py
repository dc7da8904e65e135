"""Connection: the frames that go out of and come into one peer's socket.

Outgoing frames are queued as header and user memory, and never copied. Incoming bodies are read straight into the
memory posted for them. A frame that comes before its receive is posted is kept (see `matching`).

Each side limits what the other must keep. A frame is sent at once while those that the peer may still have to keep,
each counted with what a kept frame takes beside its body, fit the limit; the peer returns credit for frames that it
keeps no longer. Any further frame is only offered: its body waits with the sender until the peer has posted the receive
and accepts it. So sockets are always read, no receive waits behind a message that nobody has received, and memory is
bounded (the eager and rendezvous protocols of MPI libraries).

    sender                                     receiver
    OFFER: tag, label, length        ─→        matches it like any frame
                                     ←─        ACCEPT, once its receive is posted
    ACCEPTED: body                   ─→        reads the body into the posted memory
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice

from ferro.collectives.label import context_of
from ferro_gloo.tcp.matching import IncomingFrame, PostedReceive, ReceiveMatcher, TransferBatch
from ferro_gloo.tcp.protocol import (
    ABORT,
    ACCEPT,
    ACCEPTED,
    CREDIT,
    DATA,
    HEADER_BYTES,
    MAX_BODY,
    NO_LABEL,
    OFFER,
    ConnectionLostError,
    pack,
    unpack,
)

_READ_AHEAD_BYTES = 16 << 10  # so that one system call reads a header and a small body
_FRAMES_PER_CALL = 8
# What a kept frame takes beside its body; measured with CPython 3.11: 600 bytes, 760 where each has a tag of its own.
KEPT_FRAME_BYTES = 768
_CREDIT_DIVISOR = 4  # credit is returned when it is this part of the limit
_NO_BODY = memoryview(b"")


@dataclass(slots=True)
class ReadEvents:
    """The tags of the aborts, and (peer, tag, label) of the unexpected frames, that were read."""

    aborted: list[int] = field(default_factory=list)
    unexpected: list[tuple[int, int, bytes]] = field(default_factory=list)


class Connection:
    """One non-blocking socket of the mesh. It is not thread-safe: the engine holds its lock."""

    def __init__(self, sock: socket.socket, peer: int, aborted: Set[int], kept_limit: int) -> None:
        """Take ownership of a socket.

        Args:
            sock: connected and authenticated.
            peer: the rank at the other end.
            aborted: the groups whose frames are dropped; the engine adds to it.
            kept_limit: how many bytes of frames each side keeps for the other, the same on both sides; one frame
                always goes.
        """
        sock.setblocking(False)
        self.sock = sock
        self.peer = peer
        self.lost: Exception | None = None
        self._aborted = aborted
        self._matcher = ReceiveMatcher()
        self._out: deque[tuple[list[memoryview], TransferBatch | None]] = deque()
        self._read_buffer = memoryview(bytearray(HEADER_BYTES + _READ_AHEAD_BYTES))
        self._buffered = 0
        self._incoming: IncomingFrame | None = None
        self._kept_limit = kept_limit
        self._without_credit = 0  # bytes of sent frames for which no credit has come
        self._credit = 0  # bytes of received frames for which none has been returned
        self._must_flush = False  # reading has queued frames
        # Offers by their numbers: those of this side, (tag, body, batch), and the peer's that this side has accepted.
        self._next_own_offer = self._next_peer_offer = 0
        self._offered: dict[int, tuple[int, memoryview, TransferBatch | None]] = {}
        self._accepted: dict[int, tuple[int, PostedReceive]] = {}

    @property
    def sending(self) -> bool:
        """True while frames wait to go out."""
        return bool(self._out)

    @property
    def holds_back(self) -> bool:
        """True while bodies wait because the peer has not received earlier messages."""
        return bool(self._offered)

    @property
    def is_offered_more(self) -> bool:
        """True while the peer holds back bodies because this rank has not received earlier messages."""
        return any(frame.offer >= 0 for frame in self._matcher.unexpected())

    @property
    def kept_bytes(self) -> int:
        """The bytes of kept frames."""
        return sum(frame.nbytes + KEPT_FRAME_BYTES for frame in self._matcher.unexpected() if frame.offer < 0)

    def queue(self, header: bytes, body: memoryview, batch: TransferBatch | None) -> None:
        """Append a data frame to the outgoing queue, or an offer of it."""
        if self.lost is not None:
            if batch is not None:
                batch.fail(self.lost)
            return
        counted = body.nbytes + KEPT_FRAME_BYTES
        if self._without_credit and self._without_credit + counted > self._kept_limit:
            length, _, tag, label = unpack(memoryview(header))
            self._offered[self._next_own_offer] = (tag, body, batch)
            self._next_own_offer += 1
            self.queue_control(length, OFFER, tag, label)
            return
        self._without_credit += counted
        parts = [memoryview(header), body] if body.nbytes else [memoryview(header)]
        self._out.append((parts, batch))

    def queue_control(self, length: int, kind: int, tag: int, label: bytes = NO_LABEL) -> None:
        """Append a frame without a body to the outgoing queue."""
        if self.lost is None:
            self._out.append(([memoryview(pack(length, kind, tag, label))], None))

    def post(self, tag: int, receive: PostedReceive) -> None:
        """Post memory for the next frame with this tag, which may have come already."""
        frame = self._matcher.pop_unexpected(tag)
        if frame is None and self.lost is None:
            self._matcher.post(tag, receive)
            return
        if frame is None or (self.lost is not None and (frame.remaining or frame.offer >= 0)):
            assert self.lost is not None, "a frame without its body is late only on a lost connection"
            receive.batch.fail(self.lost)
            return
        if frame.offer < 0:
            self._return_credit(frame.nbytes)
        error = receive.check(self.peer, frame.label, frame.nbytes)
        if error is not None:
            receive.batch.fail(error)
        elif frame.offer >= 0:
            self._accept(frame.offer, tag, receive)
        elif frame.remaining:
            frame.receive = receive
        else:
            receive.body[:] = frame.body
            receive.batch.remaining -= 1

    def unexpected_label(self, tag: int) -> bytes | None:
        """Return the label of the first unexpected frame with this tag, or None."""
        return self._matcher.unexpected_label(tag)

    def drop_before(self, tag: int) -> None:
        """Drop unexpected frames of this group's earlier collectives: no receive will come."""
        for old in self._matcher.tags_before(tag):
            self._drop(old)

    def drop_group(self, context: int) -> None:
        """Drop all receives and frames of a group, and its bodies that were only offered."""
        for tag in self._matcher.tags():
            if context_of(tag) == context:
                self._drop(tag)
        frame = self._incoming
        if frame is not None and context_of(frame.tag) == context and frame.receive is not None:
            # The caller owns its memory again, so the rest of the frame must not be written there.
            frame.receive = None
            if not frame.unexpected:
                frame.body = memoryview(bytearray(frame.nbytes))
        self._offered = {n: item for n, item in self._offered.items() if context_of(item[0]) != context}
        self._accepted = {n: item for n, item in self._accepted.items() if context_of(item[0]) != context}

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

    def read(self, events: ReadEvents) -> None:
        """Read and parse all that has come."""
        try:
            while self.lost is None:
                frame = self._incoming
                if frame is None:
                    room = self._read_buffer[self._buffered :]
                    count = self.sock.recv_into(room)
                    self._buffered += count
                else:
                    room = frame.body[frame.nbytes - frame.remaining :]
                    count = self.sock.recv_into(room)
                    frame.remaining -= count
                if count == 0:
                    self.lose("it closed the connection")
                    return
                self._parse(events)
                if count < room.nbytes and self._incoming is None:
                    break  # the socket is empty, and no frame is incomplete
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno is None:
                raise  # it comes from a signal handler of the program
            self.lose(f"receiving failed: {error}")
        if self._must_flush:
            self._must_flush = False
            self.flush()

    def lose(self, reason: str, error: Exception | None = None) -> None:
        """Mark the connection as lost; all its transfers fail with `error`."""
        if self.lost is not None:
            return
        self.lost = error or ConnectionLostError(self.peer, reason)
        self._matcher.fail_all(self.lost)
        batches = [batch for _, batch in self._out]
        batches += [batch for _, _, batch in self._offered.values()]
        batches += [receive.batch for _, receive in self._accepted.values()]
        for batch in batches:
            if batch is not None:
                batch.fail(self.lost)
        self._out.clear()
        self._offered.clear()
        self._accepted.clear()
        frame = self._incoming
        if frame is not None and frame.receive is not None:
            frame.receive.batch.fail(self.lost)

    def _drop(self, tag: int) -> None:
        for frame in self._matcher.drop(tag):
            if frame.offer < 0:
                self._return_credit(frame.nbytes)

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
        if length > MAX_BODY:
            self.lose(f"it sent a frame of {length} bytes, which is none of ours")
        elif kind == DATA:
            self._begin_data(length, tag, label, events)
        elif kind == OFFER:
            self._match_offer(length, tag, label, events)
        elif kind == ACCEPTED:
            self._read_body(length, *self._accepted.pop(tag, (0, None)))
        elif kind == ABORT:
            events.aborted.append(tag)
        elif kind == CREDIT:
            self._without_credit -= tag
        elif kind == ACCEPT:
            self._send_offered(tag)
        else:
            self.lose(f"it sent a frame of kind {kind}, which is none of ours")

    def _begin_data(self, length: int, tag: int, label: bytes, events: ReadEvents) -> None:
        receive = self._matcher.pop_posted(tag)
        if receive is None and context_of(tag) not in self._aborted:
            body = memoryview(bytearray(length))
            self._incoming = IncomingFrame(tag, label, length, body, length, None, unexpected=True)
            self._matcher.keep(self._incoming)
            events.unexpected.append((self.peer, tag, label))
            return
        self._return_credit(length)
        if receive is not None:
            error = receive.check(self.peer, label, length)
            if error is not None:
                receive.batch.fail(error)
                receive = None
        self._read_body(length, tag, receive)

    def _read_body(self, length: int, tag: int, receive: PostedReceive | None) -> None:
        """Read the body of a frame into its receive's memory, or drop it where there is none."""
        if receive is not None and receive.body.nbytes != length:
            self.lose(f"it sent {length} bytes of a message of {receive.body.nbytes}")
            receive.batch.fail(ConnectionLostError(self.peer, "it sent another size than it had offered"))
            return
        body = receive.body if receive is not None else memoryview(bytearray(length))
        self._incoming = IncomingFrame(tag, NO_LABEL, length, body, length, receive)

    def _match_offer(self, length: int, tag: int, label: bytes, events: ReadEvents) -> None:
        number = self._next_peer_offer
        self._next_peer_offer += 1
        receive = self._matcher.pop_posted(tag)
        if receive is None:
            if context_of(tag) not in self._aborted:
                self._matcher.keep(IncomingFrame(tag, label, length, _NO_BODY, 0, None, True, number))
                events.unexpected.append((self.peer, tag, label))
            return
        error = receive.check(self.peer, label, length)
        if error is not None:
            receive.batch.fail(error)
        else:
            self._accept(number, tag, receive)

    def _accept(self, number: int, tag: int, receive: PostedReceive) -> None:
        self._accepted[number] = (tag, receive)
        self.queue_control(0, ACCEPT, number)
        self._must_flush = True

    def _send_offered(self, number: int) -> None:
        """Send the body of an accepted offer, unless its group has ended meanwhile."""
        _, body, batch = self._offered.pop(number, (0, _NO_BODY, None))
        if batch is not None:
            parts = [memoryview(pack(body.nbytes, ACCEPTED, number, NO_LABEL))]
            self._out.append(([*parts, body] if body.nbytes else parts, batch))
            self._must_flush = True

    def _return_credit(self, nbytes: int) -> None:
        """Count a frame that is kept no longer; tell the peer when there are many."""
        self._credit += nbytes + KEPT_FRAME_BYTES
        if self._credit * _CREDIT_DIVISOR >= self._kept_limit:
            self.queue_control(0, CREDIT, self._credit)
            self._credit = 0
            self._must_flush = True

    def _fill_body(self, data: memoryview) -> int:
        """Copy the part of a body that is in the read buffer; return its size."""
        frame = self._incoming
        if frame is None:
            return 0
        count = min(frame.remaining, len(data))
        if count:
            start = frame.nbytes - frame.remaining
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
