"""The store's server: one thread, one selector loop, however many clients."""

from __future__ import annotations

import logging
import math
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth.listener import Listener, listen
from ferro.rendezvous.sockets import remaining_s
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.memory import BoundedTable
from ferro.runtime.environment import format_address

_JOIN_S = 5.0
_READ_BYTES = 256 << 10

_log = logging.getLogger(__name__)


class StoreServer:
    """Hosts a store in a daemon thread of this process, until `close`."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, secret: bytes) -> None:
        """Listen at an address, "" meaning all of them, and at a port, 0 meaning a free one; start serving."""
        handshake.require_secret(secret)
        listener = listen(host, port)
        self.address: tuple[str, int] = listener.getsockname()[:2]  # with the port that was chosen for port 0
        self._selector = selectors.DefaultSelector()
        self._listener = Listener(listener, secret, purpose=wire.PURPOSE, selector=self._selector, admit=self._admit)
        self._connections: set[_Connection] = set()
        self._waiting: dict[bytes, set[_Connection]] = {}  # for each key, the connections whose `get` waits for it
        # A lower bound of the deadlines of all waiting connections. It is not raised when one stops waiting: a needless
        # wake-up costs less than a search each time.
        self._next_deadline = math.inf
        self._table = BoundedTable()
        self._wakeup, self._wakeup_read = socket.socketpair()
        self._selector.register(self._wakeup_read, selectors.EVENT_READ, lambda _events: None)
        self._closing = False
        self._says_closed = False
        self._close_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"ferro-store-{self.address[1]}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def refused(self) -> int:
        """The number of connections that came with another secret and were turned away."""
        return self._listener.refused

    def close(self, *, orderly: bool = True) -> None:
        """Close all connections and end the thread, within 5 s; idempotent.

        Unless this is `orderly`, clients see the end as they would see the death of this process.
        """
        with self._close_lock:
            self._says_closed = orderly
            self._closing = True
            with suppress(OSError):  # closed before, or the thread has ended on its own
                self._wakeup.send(b"\0")
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise RendezvousError(
                    f"the thread of the store at {format_address(self.address)} did not end within {_JOIN_S} s of "
                    "close(); it ends with the process"
                )
            self._wakeup.close()

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select(self._expire()):
                    key.data(events)
        finally:
            self._listener.close()
            for connection in tuple(self._connections):
                if self._says_closed:
                    connection.say_closed()
                connection.close()
            self._selector.close()
            self._wakeup_read.close()

    def _expire(self) -> float:
        """Answer each `get` whose deadline has passed; return the seconds until the next deadline, at most a week."""
        now = time.monotonic()
        if self._next_deadline <= now:
            waiting = [connection for connections in self._waiting.values() for connection in connections]
            for connection in waiting:
                if connection.waits_for is not None and connection.deadline <= now:
                    self._stop_waiting(connection)
                    connection.reply(wire.Reply(wire.ReplyStatus.TIMEOUT))
            self._next_deadline = min((c.deadline for c in waiting if c.waits_for is not None), default=math.inf)
        return remaining_s(min(self._listener.expire() or math.inf, self._next_deadline))

    def _stop_waiting(self, connection: _Connection) -> None:
        key, connection.waits_for = connection.waits_for, None
        if key is not None:
            self._waiting[key].discard(connection)
            if not self._waiting[key]:
                del self._waiting[key]

    def _admit(self, sock: socket.socket) -> None:
        self._connections.add(_Connection(sock, self._selector, self))

    def forget(self, connection: _Connection) -> None:
        """Forget a connection that is about to be closed, and append the value that it registered for that case."""
        self._connections.discard(connection)
        self._stop_waiting(connection)
        for key, value in () if self._closing else connection.on_disconnect.items():
            try:
                self._table.append(key, value)
            except RendezvousError as exc:
                _log.warning("the value of a disconnected client was not appended: %s", exc)
            self._wake(key)

    def answer(self, connection: _Connection, request: wire.Request) -> None:
        """Reply to a request, at once or, to a `get` of a missing key, when the key is set."""
        op, key, number, value = request
        if op is wire.StoreOp.GET and self._table.get(key) is None:
            deadline = time.monotonic() + max(number, 0) / 1e6
            connection.waits_for, connection.deadline = key, deadline
            self._waiting.setdefault(key, set()).add(connection)
            self._next_deadline = min(self._next_deadline, deadline)
            return
        try:
            if op is wire.StoreOp.APPEND_ON_DISCONNECT:
                if connection.on_disconnect:
                    raise UsageError("this connection has a value to append already")
                connection.on_disconnect[key] = value
                reply = wire.Reply(wire.ReplyStatus.OK)
            elif op is wire.StoreOp.CANCEL_APPEND:
                found = connection.on_disconnect.pop(key, None) is not None
                reply = wire.Reply(wire.ReplyStatus.OK, int(found))
            else:
                reply = self._table.perform(request)
        except UsageError as exc:
            reply = wire.Reply(wire.ReplyStatus.MISUSED, value=str(exc).encode())
        except RendezvousError as exc:
            reply = wire.Reply(wire.ReplyStatus.REFUSED, value=str(exc).encode())
        connection.reply(reply)
        if op in (wire.StoreOp.SET, wire.StoreOp.ADD):
            self._wake(key)

    def _wake(self, key: bytes) -> None:
        """Answer each `get` that waits for `key`, if it is there (a refused `set` leaves it unset)."""
        value = self._table.get(key)
        if value is not None:
            for connection in self._waiting.pop(key, ()):
                connection.waits_for = None
                connection.reply(wire.Reply(wire.ReplyStatus.OK, value=value))


class _Connection:
    """One authenticated connection on the server's selector.

    A client sends one request and waits for the reply. So there is never more to hold than one request or one reply,
    and a client that sends ahead of its reply is disconnected.

    Attributes:
        on_disconnect: a key, and the value to append to it when this connection ends; or nothing.
        waits_for: the key for which its `get` waits until `deadline`, or None.
    """

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, server: StoreServer) -> None:
        self.on_disconnect: dict[bytes, bytes] = {}
        self.waits_for: bytes | None = None
        self.deadline = 0.0
        self._sock = sock
        self._selector = selector
        self._server = server
        self._received = bytearray()
        self._unsent: list[memoryview] = []
        self._awaits_reply = False
        self._closed = False
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, self._on_event)

    def reply(self, reply: wire.Reply) -> None:
        """Send the reply, now as far as possible and the rest when there is room."""
        if self._closed:
            return
        self._unsent = [memoryview(part) for part in (wire.encode_reply_header(reply), reply.value) if part]
        try:
            self._write()
        except OSError:
            self.close()

    def say_closed(self) -> None:
        """Send a CLOSED reply to a client that has all of its last reply."""
        if not self._unsent:
            self.reply(wire.Reply(wire.ReplyStatus.CLOSED))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._server.forget(self)
        self._selector.unregister(self._sock)
        self._sock.close()

    def _on_event(self, _events: int) -> None:
        if self._closed:
            return  # an earlier event of the same turn closed it
        try:
            if self._unsent:
                self._write()
            else:
                self._read()
        except BlockingIOError:
            pass
        except (OSError, wire.WireError):
            self.close()

    def _read(self) -> None:
        data = self._sock.recv(_READ_BYTES)
        if not data or self._awaits_reply:
            raise wire.WireError("left, or sent something before its reply came")
        self._received += data
        size = wire.request_bytes(self._received)
        if size is None or len(self._received) < size:
            return
        if len(self._received) > size:
            raise wire.WireError("more than one request at a time")
        request = wire.decode_request(self._received)
        self._received = bytearray()
        self._awaits_reply = True
        self._server.answer(self, request)

    def _write(self) -> None:
        with suppress(BlockingIOError):
            sent = self._sock.sendmsg(self._unsent)
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if self._unsent:
                self._unsent[0] = self._unsent[0][sent:]
        self._awaits_reply = bool(self._unsent)
        events = selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ
        self._selector.modify(self._sock, events, self._on_event)
