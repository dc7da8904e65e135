"""The content of a store: a dict that knows its bounds, without threads or sockets."""

from __future__ import annotations

import re

from ferro.errors import RendezvousError, UsageError

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 16 << 20
MAX_WILL_BYTES = 1024
MAX_TOTAL_BYTES = 256 << 20
MAX_KEYS = 100_000

_INT64 = range(-(1 << 63), 1 << 63)
_NUMBER = re.compile(rb"-?[0-9]{1,19}")


def encode_key(key: str) -> bytes:
    """Check a key and return its bytes.

    Raises:
        UsageError: it is no text, empty, or longer than 1 KiB.
    """
    try:
        encoded = key.encode()
    except (AttributeError, UnicodeEncodeError) as exc:
        raise UsageError(f"a store's key must be text that UTF-8 can hold, not {key!r}") from exc
    if not 0 < len(encoded) <= MAX_KEY_BYTES:
        raise UsageError(
            f"a store's key takes 1 to {MAX_KEY_BYTES} bytes, this one {len(encoded)}: "
            f"{key[:40]!r}. Shorten it; large or many things belong in the value."
        )
    return encoded


def check_value(key: str, value: bytes) -> None:
    """Check a value.

    Raises:
        UsageError: it is not bytes, or larger than 16 MiB.
    """
    if not isinstance(value, bytes):
        raise UsageError(f"set({key!r}) takes bytes, not {type(value).__name__}: encode it first")
    if len(value) > MAX_VALUE_BYTES:
        raise UsageError(
            f"set({key!r}) was given {len(value)} bytes; a store's value takes at most "
            f"{MAX_VALUE_BYTES}. Send large data with a collective, not through the store."
        )


def check_will(key: str, value: bytes) -> None:
    """Check what a will is to append.

    Raises:
        UsageError: it is not bytes, or larger than 1 KiB.
    """
    if not isinstance(value, bytes) or len(value) > MAX_WILL_BYTES:
        raise UsageError(
            f"will({key!r}) takes up to {MAX_WILL_BYTES} bytes, not "
            f"{f'{len(value)}' if isinstance(value, bytes) else type(value).__name__}: a word that "
            "tells who is gone is enough"
        )


def check_amount(key: str, amount: int) -> None:
    """Check the number given to `add`.

    Raises:
        UsageError: it is not an integer of 64 bits.
    """
    if not isinstance(amount, int) or amount not in _INT64:
        raise UsageError(f"add({key!r}) takes a 64-bit integer, not {amount!r}")


class Table:
    """Keys and values within the bounds above. Not thread-safe: its owner sees to that."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._total_bytes = 0

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        return self._values.get(key)

    def set(self, key: bytes, value: bytes) -> None:
        """Set `key`.

        Raises:
            RendezvousError: the store is full; nothing changed.
        """
        old = self._values.get(key)
        growth = len(value) - len(old) if old is not None else len(key) + len(value)
        if self._total_bytes + growth > MAX_TOTAL_BYTES:
            raise self._full(key, f"{self._total_bytes} of {MAX_TOTAL_BYTES} bytes")
        if old is None and len(self._values) >= MAX_KEYS:
            raise self._full(key, f"{len(self._values)} of {MAX_KEYS} keys")
        self._values[key] = value
        self._total_bytes += growth

    def add(self, key: bytes, amount: int) -> int:
        """Add to the decimal number in `key`; a missing key counts as 0.

        Raises:
            UsageError: the value is no number, or the sum does not fit 64 bits.
            RendezvousError: the store is full.
            In each case nothing changed.
        """
        value = self._values.get(key, b"0")
        if not _NUMBER.fullmatch(value):
            raise UsageError(f"add({_text(key)!r}) failed: the key holds something else than a number")
        total = int(value) + amount
        if total not in _INT64:
            raise UsageError(f"add({_text(key)!r}) failed: the sum {total} does not fit 64 bits")
        self.set(key, str(total).encode())
        return total

    def append(self, key: bytes, more: bytes) -> None:
        """Lengthen the value of `key`; a missing key counts as empty.

        Raises:
            RendezvousError: the value would be too large, or the store is full; nothing changed.
        """
        value = self._values.get(key, b"") + more
        if len(value) > MAX_VALUE_BYTES:
            raise RendezvousError(f"{_text(key)!r} holds as much as a value may: nothing was added")
        self.set(key, value)

    def delete(self, key: bytes) -> bool:
        """Remove `key`; return whether it was there."""
        value = self._values.pop(key, None)
        if value is None:
            return False
        self._total_bytes -= len(key) + len(value)
        return True

    def _full(self, key: bytes, used: str) -> RendezvousError:
        return RendezvousError(
            f"the store is full ({used} in use): {_text(key)!r} was not set. Delete keys that "
            f"are no longer needed, and send large data with a collective."
        )


def _text(key: bytes) -> str:
    return key.decode(errors="replace")
