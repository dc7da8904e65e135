"""The store as a rank uses it: a thread-safe client over a few connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth.addresses import remaining_s, show_address
from ferro.rendezvous.auth.connect import connect
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.exchange import exchange
from ferro.rendezvous.store.interface import Store, StoreTimeout
from ferro.rendezvous.store.liveness import Will
from ferro.rendezvous.store.pool import ConnectionPool
from ferro.rendezvous.store.prefix import PrefixStore
from ferro.rendezvous.store.table import check_amount, check_value, check_will, encode_key

# How much later than a get's deadline the store's word that nobody set the key may come.
_GRACE_S = 2.0


class StoreClient:
    """The `Store` protocol over TCP.

    A thread that waits in `get` has a connection to itself, so it holds nobody up; there are at
    most 64.

    Attributes:
        local_host: this machine's address on the way to the store: what others can reach us by.
        remote_host: the address at which the store was reached.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, *, deadline: float, request_timeout_s: float = 30.0
    ) -> None:
        """Connect, waiting for the store to start if need be.

        Args:
            address: host and port of the store.
            secret: the job's.
            deadline: absolute `time.monotonic()` second by which to be connected.
            request_timeout_s: how long a request may take, beyond what `get` is told to wait.

        Raises:
            RendezvousError: the store could not be reached.
            AuthenticationError: it does not hold the same secret.
        """
        self._where = f"the store at {show_address(*address)}"
        self._request_timeout_s = request_timeout_s

        self._connect = partial(connect, address, secret, purpose=wire.PURPOSE)
        first = self._connect(deadline=deadline)
        self.local_host: str = first.getsockname()[0]
        self.remote_host: str = first.getpeername()[0]
        self._will: Will | None = None
        self._pool = ConnectionPool(self._open)
        self._pool.put(first)
        self._will_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`."""
        encoded = encode_key(key)
        check_value(key, value)
        self._ask(wire.Request(wire.Op.SET, encoded, value=value))

    def get(self, key: str, *, deadline: float) -> bytes:
        """See `Store.get`."""
        encoded = encode_key(key)
        started = time.monotonic()
        wait_us = int(remaining_s(deadline) * 1e6)
        request = wire.Request(wire.Op.GET, encoded, wait_us)
        try:
            reply = self._exchange(request, started + wait_us / 1e6 + _GRACE_S)
        except TimeoutError as exc:
            where = f"{self._where}, which did not answer either ({exc})"
            raise StoreTimeout(key, time.monotonic() - started, where) from exc
        if reply.status is wire.Status.TIMEOUT:
            raise StoreTimeout(key, time.monotonic() - started, self._where)
        return reply.value

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        encoded = encode_key(key)
        check_amount(key, amount)
        return self._ask(wire.Request(wire.Op.ADD, encoded, amount)).number

    def delete(self, key: str) -> bool:
        """See `Store.delete`."""
        return bool(self._ask(wire.Request(wire.Op.DELETE, encode_key(key))).number)

    def will(self, key: str, value: bytes) -> None:
        """See `Store.will`; it has a connection to itself, which ends with this process."""
        encoded = encode_key(key)
        check_will(key, value)
        deadline = time.monotonic() + self._request_timeout_s
        with self._will_lock:
            if self._pool.closed:
                raise RendezvousError("this store client was closed")
            if self._will is not None:
                raise UsageError(f"will({key!r}): this store has a will already, and takes one")
            self._will = Will(self._connect(deadline=deadline), encoded)
            try:
                with self._telling():
                    reply = self._will.register(value, deadline)
            except TimeoutError as exc:
                raise self._slow("will", exc) from exc
        self._check(reply)

    def carry_out_will(self) -> None:
        """Have the will carried out now, if there is one; the store may be used, and left, as ever.

        For a process that fails and yet does not die at once.
        """
        with self._will_lock:
            will, self._will = self._will, None
        if will is not None:
            will.carry_out()

    def prefix(self, name: str) -> Store:
        """See `Store.prefix`; the view shares this client's connections."""
        return PrefixStore(self, name)

    def close(self) -> None:
        """Say farewell, close all connections, wake threads that wait on one; idempotent."""
        self._pool.close()
        with self._will_lock:
            if self._will is not None:
                self._will.withdraw()

    def _open(self, deadline: float) -> socket.socket:
        """Make a further connection, unless it is known that nobody is there any more."""
        if self._will is not None and self._will.broken():
            raise ConnectionResetError("it closed the connection")
        return self._connect(deadline=deadline)

    def _ask(self, request: wire.Request) -> wire.Reply:
        """A request that the store answers at once."""
        try:
            return self._exchange(request, time.monotonic() + self._request_timeout_s)
        except TimeoutError as exc:
            raise self._slow(request.op.name.lower(), exc) from exc

    def _slow(self, what: str, cause: TimeoutError) -> RendezvousError:
        return RendezvousError(
            f"{self._where} did not answer {what} within {self._request_timeout_s} s ({cause}). "
            f"The process that hosts it is stopped or overloaded, or the network between is down."
        )

    def _exchange(self, request: wire.Request, deadline: float) -> wire.Reply:
        with self._telling(), self._pool.lend(deadline) as sock:
            reply = exchange(sock, request, deadline)
        self._check(reply)
        return reply

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell a connection's failures as the store's."""
        try:
            yield
        except TimeoutError:
            raise
        except (OSError, wire.WireError) as exc:
            if self._pool.closed:
                raise RendezvousError("this store client was closed") from exc
            raise RendezvousError(
                f"{self._where} is gone ({exc}). Usually the process that hosts it, rank 0 or "
                f"`ferro run`, has ended: read its log first."
            ) from exc

    def _check(self, reply: wire.Reply) -> None:
        """Raise what the store says in place of an answer."""
        if reply.status is wire.Status.MISUSED:
            raise UsageError(reply.value.decode(errors="replace"))
        if reply.status is wire.Status.REFUSED:
            raise RendezvousError(f"{self._where}: {reply.value.decode(errors='replace')}")
