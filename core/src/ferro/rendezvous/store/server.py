"""The store's server: one thread, one selector loop, however many clients."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth.addresses import remaining_s, show_address
from ferro.rendezvous.auth.listener import Listener, listen
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.connection import Member
from ferro.rendezvous.store.table import Table
from ferro.rendezvous.store.waiters import Parking

_JOIN_S = 5.0

_log = logging.getLogger(__name__)


class StoreServer:
    """Hosts a store in a daemon thread of this process, until `close`.

    Attributes:
        address: host and port it listens on; the port is the one that was chosen for port 0.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, secret: bytes) -> None:
        """Listen and start serving.

        Args:
            host: address to listen on; "" for all.
            port: 0 lets the system choose.
            secret: the job's; clients must hold it.

        Raises:
            RendezvousError: the address cannot be listened on.
            AuthenticationError: the secret is empty.
        """
        handshake.require_secret(secret)
        listener = listen(host, port)
        name = listener.getsockname()
        self.address: tuple[str, int] = (name[0], name[1])
        self._selector = selectors.DefaultSelector()
        self._gate = Listener(listener, secret, purpose=wire.PURPOSE, selector=self._selector, admit=self._admit)
        self._members: set[Member] = set()
        self._parking = Parking()
        self._table = Table()
        self._alarm, self._alarm_heard = socket.socketpair()
        self._selector.register(self._alarm_heard, selectors.EVENT_READ, self._on_alarm)
        self._closing = False
        self._close_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"ferro-store-{self.address[1]}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def refused(self) -> int:
        """How many connections came with another secret and were turned away."""
        return self._gate.refused

    def close(self) -> None:
        """Disconnect everybody and end the thread; idempotent.

        Raises:
            RendezvousError: the thread did not end within 5 s.
        """
        with self._close_lock:
            with suppress(OSError):  # closed before, or the thread has ended on its own
                self._alarm.send(b"\0")
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise RendezvousError(
                    f"the thread of the store at {show_address(*self.address)} did not end "
                    f"within {_JOIN_S} s of close(); it ends with the process"
                )
            self._alarm.close()

    def _on_alarm(self, _events: int) -> None:
        self._closing = True

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select(self._expire()):
                    key.data(events)
        finally:
            self._gate.close()
            for member in tuple(self._members):
                member.close()
            self._selector.close()
            self._alarm_heard.close()

    def _expire(self) -> float | None:
        """Do what is due; return the seconds until something is again, None for never."""
        for member in self._parking.expire(time.monotonic()):
            member.reply(wire.Reply(wire.Status.TIMEOUT))
        due = [at for at in (self._gate.expire(), self._parking.due) if at is not None]
        return remaining_s(min(due)) if due else None

    def _admit(self, sock: socket.socket) -> None:
        self._members.add(Member(sock, self._selector, answer=self._answer, forget=self._forget))

    def _forget(self, member: Member) -> None:
        self._members.discard(member)
        self._parking.forget(member)
        if member.will is not None and not self._closing:
            self._carry_out(*member.will)

    def _carry_out(self, key: bytes, value: bytes) -> None:
        """Do what a member wanted done when it leaves without a farewell."""
        try:
            self._table.append(key, value)
        except RendezvousError as exc:
            _log.warning("a client's last will was not carried out: %s", exc)
        self._wake(key)

    def _answer(self, member: Member, request: wire.Request) -> None:
        if request.op is wire.Op.GET and self._table.get(request.key) is None:
            wait_s = max(request.number, 0) / 1e6
            self._parking.park(member, request.key, time.monotonic() + wait_s)
            return
        if request.op in (wire.Op.WILL, wire.Op.WITHDRAW):
            member.reply(_keep_will(member, request))
            return
        member.reply(self._perform(request))
        if request.op in (wire.Op.SET, wire.Op.ADD):
            self._wake(request.key)

    def _perform(self, request: wire.Request) -> wire.Reply:
        table, key = self._table, request.key
        number, value = 0, b""
        try:
            match request.op:
                case wire.Op.SET:
                    table.set(key, request.value)
                case wire.Op.GET:
                    value = table.get(key) or b""
                case wire.Op.ADD:
                    number = table.add(key, request.number)
                case wire.Op.DELETE:
                    number = int(table.delete(key))
        except UsageError as exc:
            return wire.Reply(wire.Status.MISUSED, value=str(exc).encode())
        except RendezvousError as exc:
            return wire.Reply(wire.Status.REFUSED, value=str(exc).encode())
        return wire.Reply(wire.Status.OK, number, value)

    def _wake(self, key: bytes) -> None:
        """Answer all who wait for `key`, if it is there (a refused `set` leaves it unset)."""
        value = self._table.get(key)
        if value is not None:
            for member in self._parking.release(key):
                member.reply(wire.Reply(wire.Status.OK, value=value))


def _keep_will(member: Member, request: wire.Request) -> wire.Reply:
    """Note a member's will, or its farewell."""
    if request.op is wire.Op.WITHDRAW:
        withdrawn = member.will is not None and member.will[0] == request.key
        if withdrawn:
            member.will = None
        return wire.Reply(wire.Status.OK, int(withdrawn))
    if member.will is not None:
        return wire.Reply(wire.Status.MISUSED, value=b"this connection has a will already")
    member.will = (request.key, request.value)
    return wire.Reply(wire.Status.OK)
