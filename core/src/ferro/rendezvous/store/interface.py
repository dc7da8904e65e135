"""The interface of a store, the bounds of its keys and values, and views of it under a prefix."""

from __future__ import annotations

from typing import Protocol

from ferro.errors import FerroError, UsageError

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 16 << 20
MAX_APPEND_BYTES = 1024

INT64 = range(-(1 << 63), 1 << 63)


class StoreTimeout(FerroError, TimeoutError):
    """`get` waited for a key that nobody set in time.

    Attributes:
        key: the key waited for, with its prefix.
        seconds: how long `get` waited.
    """

    def __init__(self, key: str, seconds: float, where: str) -> None:
        super().__init__(
            f"get({key!r}) waited {seconds:.1f} s and nobody set that key in {where}. The rank "
            f"that should set it has not come so far: read its log first, or allow more time.",
            op="get",
        )
        self.key = key
        self.seconds = seconds


class Store(Protocol):
    """A small key-value store that all ranks of a job see. Every method is thread-safe.

    Keys hold 1 to 1024 bytes of UTF-8, values up to 16 MiB; a store holds up to 100,000 keys and
    256 MiB in all. Keys of one application are kept apart from others' by `prefix`.

    Every method raises UsageError, before anything is sent, when an argument is out of these
    bounds, and RendezvousError when the store is closed, gone or full.
    """

    def set(self, key: str, value: bytes) -> None:
        """Give `key` this value, and wake every `get` that waits for it."""
        ...

    def get(self, key: str, *, deadline: float) -> bytes:
        """Wait until `key` is set; return its value.

        Args:
            key: the key to look for.
            deadline: absolute `time.monotonic()` second; one that has passed asks once.

        Raises:
            StoreTimeout: nobody set it in time.
        """
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to the number that `key` holds, atomically; return the sum.

        A missing key counts as 0. `get` returns the number as decimal ASCII.

        Raises:
            UsageError: `key` holds something else, or the sum does not fit 64 bits.
        """
        ...

    def delete(self, key: str) -> bool:
        """Remove `key`; return True if it was there."""
        ...

    def append_on_disconnect(self, key: str, value: bytes) -> None:
        """Have `value` appended to the value of `key`, should this process end without `close`.

        Not even SIGKILL prevents it, and every `get` that waits for `key` is woken. Only a host
        that vanishes from the network is noticed no sooner than TCP itself notices. After `close`
        nothing is appended. A store and all its views have one such value.

        Args:
            key: the key to append to; missing, it counts as empty.
            value: up to 1 KiB.

        Raises:
            UsageError: this store has such a value already.
        """
        ...

    def prefix(self, name: str) -> Store:
        """Return a view of this store whose keys all begin with `name/`; views nest."""
        ...

    def close(self) -> None:
        """Release the connections; idempotent. Closing a view leaves its store open."""
        ...


class PrefixStore:
    """The keys of `store` that begin with `name/`; as thread-safe as `store` is."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._name}/{key}", value)

    def get(self, key: str, *, deadline: float) -> bytes:
        return self._store.get(f"{self._name}/{key}", deadline=deadline)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(f"{self._name}/{key}", amount)

    def delete(self, key: str) -> bool:
        return self._store.delete(f"{self._name}/{key}")

    def append_on_disconnect(self, key: str, value: bytes) -> None:
        self._store.append_on_disconnect(f"{self._name}/{key}", value)

    def prefix(self, name: str) -> Store:
        return PrefixStore(self._store, f"{self._name}/{name}")

    def close(self) -> None:
        """Do nothing: the store is closed by its owner."""


def encode_key(key: str) -> bytes:
    """Check a key and encode it."""
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
    if not isinstance(value, bytes):
        raise UsageError(f"set({key!r}) takes bytes, not {type(value).__name__}: encode it first")
    if len(value) > MAX_VALUE_BYTES:
        raise UsageError(
            f"set({key!r}) was given {len(value)} bytes; a store's value takes at most "
            f"{MAX_VALUE_BYTES}. Send large data with a collective, not through the store."
        )


def check_append(key: str, value: bytes) -> None:
    if not isinstance(value, bytes) or len(value) > MAX_APPEND_BYTES:
        given = len(value) if isinstance(value, bytes) else type(value).__name__
        raise UsageError(
            f"append_on_disconnect({key!r}) takes up to {MAX_APPEND_BYTES} bytes, not {given}: "
            "a word that tells who is gone is enough"
        )


def check_amount(key: str, amount: int) -> None:
    if not isinstance(amount, int) or amount not in INT64:
        raise UsageError(f"add({key!r}) takes a 64-bit integer, not {amount!r}")
