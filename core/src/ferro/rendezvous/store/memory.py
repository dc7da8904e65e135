"""A store inside one process, for simulated ranks and for a world of one."""

from __future__ import annotations

import threading
import time

from ferro.errors import RendezvousError
from ferro.rendezvous.auth.addresses import remaining_s
from ferro.rendezvous.store.interface import Store, StoreTimeout
from ferro.rendezvous.store.prefix import PrefixStore
from ferro.rendezvous.store.table import Table, check_amount, check_value, check_will, encode_key


class MemoryStore:
    """The `Store` protocol over a dict; threads are its ranks."""

    def __init__(self) -> None:
        self._table = Table()
        self._changed = threading.Condition()
        self._closed = False

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`."""
        encoded = encode_key(key)
        check_value(key, value)
        with self._changed:
            self._check_open()
            self._table.set(encoded, value)
            self._changed.notify_all()

    def get(self, key: str, *, deadline: float) -> bytes:
        """See `Store.get`."""
        encoded = encode_key(key)
        started = time.monotonic()
        with self._changed:
            while True:
                self._check_open()
                value = self._table.get(encoded)
                if value is not None:
                    return value
                left = remaining_s(deadline)
                if not left:
                    raise StoreTimeout(key, time.monotonic() - started, "this process's store")
                self._changed.wait(left)

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        encoded = encode_key(key)
        check_amount(key, amount)
        with self._changed:
            self._check_open()
            total = self._table.add(encoded, amount)
            self._changed.notify_all()
            return total

    def delete(self, key: str) -> bool:
        """See `Store.delete`."""
        encoded = encode_key(key)
        with self._changed:
            self._check_open()
            return self._table.delete(encoded)

    def will(self, key: str, value: bytes) -> None:
        """See `Store.will`; there is nothing to do, for this store ends with the process."""
        encode_key(key)
        check_will(key, value)
        with self._changed:
            self._check_open()

    def prefix(self, name: str) -> Store:
        """See `Store.prefix`."""
        return PrefixStore(self, name)

    def close(self) -> None:
        """Wake everybody who waits, with RendezvousError; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise RendezvousError("this store was closed; make a new one")
