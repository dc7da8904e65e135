"""The interface of a store, a view of a store under a prefix, and the checks of arguments that stores share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from ferro.errors import FerroError, UsageError
from ferro.rendezvous.store.wire import INT64, MAX_APPEND_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Op, Reply, Request


class StoreTimeout(FerroError, TimeoutError):
    """`get` waited `seconds` for `key` (with its prefix), and nobody set it."""

    def __init__(self, key: str, seconds: float, where: str) -> None:
        super().__init__(
            f"get({key!r}) waited {seconds:.1f} s and nobody set that key in {where}. The rank that should set it has "
            "not come so far: read its log first, or allow more time.",
            op="get",
        )
        self.key = key
        self.seconds = seconds


class Store(Protocol):
    """A small key-value store that all ranks of a job see. Every method is thread-safe.

    Keys hold 1 to 1024 bytes of UTF-8, values up to 16 MiB; a store holds up to 100,000 keys and 256 MiB in all. Keys
    of one application are kept apart from others' by `prefix`.

    Every method raises UsageError, before anything is sent, when an argument is out of these bounds, and
    RendezvousError when the store is closed, gone or full.
    """

    def set(self, key: str, value: bytes) -> None:
        """Give `key` this value, and wake every `get` that waits for it."""
        ...

    def get(self, key: str, *, deadline: float) -> bytes:
        """Wait until `key` is set; return its value.

        Raises:
            StoreTimeout: nobody set it before `deadline` (`time.monotonic()`); one that has passed asks once.
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
        """Have up to 1 KiB appended to the value of `key`, should this process end without `close`.

        Not even SIGKILL prevents it, and every `get` that waits for `key` is woken. Only a host that vanishes from the
        network is noticed no sooner than TCP itself notices. A missing key counts as empty. A store and all its views
        have one such value.

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


class RequestStore(ABC):
    """The `Store` interface, made of requests whose arguments were checked."""

    def set(self, key: str, value: bytes) -> None:
        encoded = _encode_key(key)
        if not isinstance(value, bytes):
            raise UsageError(f"set({key!r}) takes bytes, not {type(value).__name__}: encode it first")
        if len(value) > MAX_VALUE_BYTES:
            raise UsageError(
                f"set({key!r}) was given {len(value)} bytes; a store's value takes at most {MAX_VALUE_BYTES}. Send "
                "large data with a collective, not through the store."
            )
        self._ask(Request(Op.SET, encoded, value=value))

    def get(self, key: str, *, deadline: float) -> bytes:
        return self._wait(key, Request(Op.GET, _encode_key(key)), deadline)

    def add(self, key: str, amount: int) -> int:
        encoded = _encode_key(key)
        if not isinstance(amount, int) or amount not in INT64:
            raise UsageError(f"add({key!r}) takes a 64-bit integer, not {amount!r}")
        return self._ask(Request(Op.ADD, encoded, amount)).number

    def delete(self, key: str) -> bool:
        return bool(self._ask(Request(Op.DELETE, _encode_key(key))).number)

    def append_on_disconnect(self, key: str, value: bytes) -> None:
        encoded = _encode_key(key)
        if not isinstance(value, bytes) or len(value) > MAX_APPEND_BYTES:
            given = len(value) if isinstance(value, bytes) else type(value).__name__
            raise UsageError(
                f"append_on_disconnect({key!r}) takes up to {MAX_APPEND_BYTES} bytes, not {given}: a word that tells "
                "who is gone is enough"
            )
        self._ask(Request(Op.APPEND_ON_DISCONNECT, encoded, value=value))

    def prefix(self, name: str) -> Store:
        return PrefixStore(self, name)

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _ask(self, request: Request) -> Reply:
        """Make a request other than a GET, which is answered at once."""

    @abstractmethod
    def _wait(self, key: str, request: Request, deadline: float) -> bytes:
        """Make a GET; wait for the value until `deadline`."""


def _encode_key(key: str) -> bytes:
    try:
        encoded = key.encode()
    except (AttributeError, UnicodeEncodeError) as exc:
        raise UsageError(f"a store's key must be text that UTF-8 can hold, not {key!r}") from exc
    if not 0 < len(encoded) <= MAX_KEY_BYTES:
        raise UsageError(
            f"a store's key takes 1 to {MAX_KEY_BYTES} bytes, this one {len(encoded)}: {key[:40]!r}. Shorten it; large "
            "or many things belong in the value."
        )
    return encoded
