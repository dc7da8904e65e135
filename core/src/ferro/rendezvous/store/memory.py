"""The content of a store within its bounds, and a store inside one process for simulated ranks and a world of one."""

from __future__ import annotations

import re
import threading
import time

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.sockets import remaining_s
from ferro.rendezvous.store.interface import Store, StoreTimeout, checked_request
from ferro.rendezvous.store.wire import INT64, MAX_VALUE_BYTES, Reply, ReplyStatus, Request, StoreOp

MAX_TOTAL_BYTES = 256 << 20
MAX_KEYS = 100_000

_NUMBER = re.compile(rb"-?[0-9]{1,19}")


class BoundedTable:
    """Keys and values within the bounds above; a method that raises changes nothing. Not thread-safe."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self.total_bytes = 0

    def perform(self, request: Request) -> Reply:
        """Carry out a SET, GET, ADD or DELETE; do nothing for other requests."""
        op, key, number, value = request
        match op:
            case StoreOp.SET:
                self.set(key, value)
            case StoreOp.GET:
                return Reply(ReplyStatus.OK, value=self.get(key) or b"")
            case StoreOp.ADD:
                return Reply(ReplyStatus.OK, self.add(key, number))
            case StoreOp.DELETE if (old := self._values.pop(key, None)) is not None:
                self.total_bytes -= len(key) + len(old)
                return Reply(ReplyStatus.OK, 1)
        return Reply(ReplyStatus.OK)

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def set(self, key: bytes, value: bytes) -> None:
        old = self._values.get(key)
        growth = len(value) - len(old) if old is not None else len(key) + len(value)
        if self.total_bytes + growth > MAX_TOTAL_BYTES:
            raise _full(key, f"{self.total_bytes} of {MAX_TOTAL_BYTES} bytes")
        if old is None and len(self._values) >= MAX_KEYS:
            raise _full(key, f"{len(self._values)} of {MAX_KEYS} keys")
        self._values[key] = value
        self.total_bytes += growth

    def add(self, key: bytes, amount: int) -> int:
        value = self._values.get(key, b"0")
        if not _NUMBER.fullmatch(value):
            raise UsageError(f"add({_text(key)!r}) failed: the key holds something else than a number")
        total = int(value) + amount
        if total not in INT64:
            raise UsageError(f"add({_text(key)!r}) failed: the sum {total} does not fit 64 bits")
        self.set(key, str(total).encode())
        return total

    def append(self, key: bytes, more: bytes) -> None:
        value = self._values.get(key, b"") + more
        if len(value) > MAX_VALUE_BYTES:
            raise RendezvousError(f"{_text(key)!r} holds as much as a value may: nothing was added")
        self.set(key, value)


def _full(key: bytes, used: str) -> RendezvousError:
    return RendezvousError(
        f"the store is full ({used} in use): {_text(key)!r} was not set. Delete keys that are no longer needed, and "
        "send large data with a collective."
    )


def _text(key: bytes) -> str:
    return key.decode(errors="replace")


class MemoryStore(Store):
    """The `Store` interface over a table of this process; threads are its ranks."""

    def __init__(self) -> None:
        self._table = BoundedTable()
        self._changed = threading.Condition()
        self._closed = False

    def close(self) -> None:
        """Wake every thread that waits in `get`, with RendezvousError; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ask(self, op: StoreOp, key: str, number: int = 0, value: bytes = b"") -> Reply:
        request = checked_request(op, key, number, value)
        with self._changed:
            self._check_open()
            reply = self._table.perform(request)
            self._changed.notify_all()
            return reply

    def get(self, key: str, *, deadline: float) -> bytes:
        encoded = checked_request(StoreOp.GET, key).key
        started = time.monotonic()
        with self._changed:
            while True:
                self._check_open()
                value = self._table.get(encoded)
                if value is not None:
                    return value
                left_s = remaining_s(deadline)
                if not left_s:
                    raise StoreTimeout(key, time.monotonic() - started, "this process's store")
                self._changed.wait(left_s)

    def _check_open(self) -> None:
        if self._closed:
            raise RendezvousError("this store was closed; make a new one")
