"""The store as a rank uses it: a thread-safe client over a pool of connections."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth.connect import connect
from ferro.rendezvous.sockets import numeric_host, remaining_s
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.interface import Store, StoreGone, StoreTimeout, checked_request
from ferro.rendezvous.store.liveness import LivenessConnection
from ferro.runtime.environment import format_address

MAX_CONNECTIONS = 64

_GRACE_S = 2.0  # how long the store may take after the deadline of a `get` to answer that nobody set the key
_CLOCK_S = 0.05  # how much too early a socket may notice a deadline
# The store answered before, so a further connection comes at once or, after a retry or two, not at all.
_CONNECT_S = 5.0


class StoreClient(Store):
    """The `Store` interface over TCP; a thread that waits in `get` has one of at most 64 connections to itself."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        *,
        deadline: float,
        request_timeout_s: float = 30.0,
        host: int | None = None,
    ) -> None:
        """Connect before `deadline`, as `auth.connect.connect` does, waiting for the store to start if need be.

        A request may take `request_timeout_s`, beyond the time that `get` is told to wait. `host` is the rank whose
        process hosts the store, which StoreGone names.
        """
        self._host = host
        self._host_left = False  # it said that it leaves in good order
        self._where = f"the store at {format_address(address)}"
        self.request_timeout_s = request_timeout_s
        first = connect(address, secret, purpose=wire.PURPOSE, deadline=deadline)
        self._connect = partial(connect, address, secret, purpose=wire.PURPOSE, started=True)
        self.local_host = numeric_host(first.getsockname())  # an address by which others can reach this machine
        self.remote_host = numeric_host(first.getpeername())
        self._liveness: LivenessConnection | None = None
        self._liveness_lock = threading.Lock()
        self._changed = threading.Condition()
        self._idle = [first]
        self._in_use: set[socket.socket] = set()
        self._users = 0
        self._closed = False
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def declare_lost(self) -> None:
        """Have the value of `append_on_disconnect` appended now, for a process that fails without dying."""
        if os.getpid() != self._pid:
            return
        with self._liveness_lock:
            liveness, self._liveness = self._liveness, None
        if liveness is not None:
            liveness.break_off()

    def close(self) -> None:
        """Close all connections in good order, and wake threads that wait on one; idempotent.

        A forked child leaves them to its parent.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed = True
            for sock in self._idle:
                sock.close()
            self._idle.clear()
            for sock in self._in_use:
                with suppress(OSError):  # the store may have gone first
                    sock.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        with self._liveness_lock:
            if self._liveness is not None:
                self._liveness.cancel()

    def _ask(self, op: wire.StoreOp, key: str, number: int = 0, value: bytes = b"") -> wire.Reply:
        request = checked_request(op, key, number, value)
        self._check_open()
        deadline = time.monotonic() + self.request_timeout_s
        try:
            if op is wire.StoreOp.APPEND_ON_DISCONNECT:
                return self._register(request, deadline)
            return self._exchange(request, deadline)
        except TimeoutError as exc:
            if time.monotonic() < deadline - _CLOCK_S:
                raise  # it is the program's own, from a signal handler
            raise RendezvousError(
                f"{self._where} did not answer {op.name.lower()} within {self.request_timeout_s} s ({exc}). "
                "The process that hosts it is stopped or overloaded, or the network between is down."
            ) from exc

    def get(self, key: str, *, deadline: float) -> bytes:
        started = time.monotonic()
        wait_us = int(remaining_s(deadline) * 1e6)
        request = checked_request(wire.StoreOp.GET, key, wait_us)
        self._check_open()
        try:
            reply = self._exchange(request, started + wait_us / 1e6 + _GRACE_S)
        except TimeoutError as exc:
            if time.monotonic() < started + wait_us / 1e6 + _GRACE_S - _CLOCK_S:
                raise  # it is the program's own, from a signal handler
            where = f"{self._where}, which did not answer either ({exc})"
            raise StoreTimeout(key, time.monotonic() - started, where) from exc
        if reply.status is wire.ReplyStatus.TIMEOUT:
            raise StoreTimeout(key, time.monotonic() - started, self._where)
        return reply.value

    def _register(self, request: wire.Request, deadline: float) -> wire.Reply:
        """Make the request on a connection of its own, which ends with this process."""
        with self._liveness_lock:
            self._check_open()
            if self._liveness is not None:
                key = request.key.decode()
                raise UsageError(f"append_on_disconnect({key!r}): this store has a value already, and takes one")
            with self._translating():
                liveness = LivenessConnection(self._connect(deadline=deadline), request.key)
                try:
                    reply = self._check(liveness.register(request, deadline))
                except BaseException:
                    liveness.sock.close()
                    raise
            self._liveness = liveness
            return reply

    def _exchange(self, request: wire.Request, deadline: float) -> wire.Reply:
        with self._translating(), self._connection(deadline) as sock:
            reply = wire.exchange(sock, request, deadline)
        return self._check(reply)

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[socket.socket]:
        """Lend a connection to one request; an exception closes it, since half a message may have been sent."""
        with self._changed:
            free = self._changed.wait_for(lambda: self._closed or self._users < MAX_CONNECTIONS, remaining_s(deadline))
            self._check_open()
            if not free:
                raise TimeoutError(f"all {MAX_CONNECTIONS} connections are in use")
            self._users += 1
            sock = self._idle.pop() if self._idle else None
            if sock is not None:
                self._in_use.add(sock)
        usable = False
        try:
            if sock is None:
                if self._liveness is not None and self._liveness.ended():  # the store is known to be gone
                    raise ConnectionResetError("it closed the connection")
                sock = self._connect(deadline=min(deadline, time.monotonic() + _CONNECT_S))
                with self._changed:
                    self._check_open()
                    self._in_use.add(sock)
            yield sock
            usable = True
        finally:
            with self._changed:
                self._users -= 1
                if sock is not None:
                    self._in_use.discard(sock)
                    if usable and not self._closed:
                        self._idle.append(sock)
                    else:
                        sock.close()
                self._changed.notify()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Translate a connection's errors to the store's."""
        try:
            yield
        except TimeoutError:
            raise
        except (OSError, wire.WireError) as exc:
            self._check_open()
            if self._liveness is not None and self._liveness.ended():
                self._host_left |= self._liveness.store_left
            raise StoreGone(self._where, self._host, exc, orderly=self._host_left) from exc

    def _check(self, reply: wire.Reply) -> wire.Reply:
        if reply.status is wire.ReplyStatus.CLOSED:
            self._host_left = True
            raise StoreGone(self._where, self._host, "it was closed", orderly=True)
        if reply.status is wire.ReplyStatus.MISUSED:
            raise UsageError(reply.value.decode(errors="replace"))
        if reply.status is wire.ReplyStatus.REFUSED:
            raise RendezvousError(f"{self._where}: {reply.value.decode(errors='replace')}")
        return reply

    def _check_open(self) -> None:
        if os.getpid() != self._pid:  # a lock may be held by a thread that the child does not have
            raise UsageError(f"this process was forked from process {self._pid}, whose store it must not use")
        if self._closed:
            raise RendezvousError("this store client was closed")
