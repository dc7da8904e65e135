"""The interface of a store, a view of a store under a prefix, and the checks of arguments that stores share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ferro.errors import FerroError, RendezvousError, UsageError
from ferro.rendezvous.store.wire import INT64, MAX_APPEND_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Reply, Request, StoreOp


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


class StoreGone(RendezvousError):
    """The process that hosts the store has ended: `peer` is its rank in the world, or None where it is no rank.

    `orderly` says that it left in good order; otherwise it died or failed.
    """

    def __init__(self, where: str, host: int | None, reason: object, *, orderly: bool) -> None:
        who = "the process that hosts it, usually `ferro run`," if host is None else f"rank {host}, which hosts it,"
        how = "has left in good order" if orderly else "has ended: read its log first"
        super().__init__(f"{where} is gone ({reason}): {who} {how}.", peer=host)
        self.orderly = orderly


class Store(ABC):
    """A small key-value store that all ranks of a job see. Every method is thread-safe.

    Keys hold 1 to 1024 bytes of UTF-8, values up to 16 MiB; a store holds up to 100,000 keys and 256 MiB in all. Keys
    of one application are kept apart from others' by `prefix`.

    Every method raises UsageError, before anything is sent, when an argument is out of these bounds, and
    RendezvousError when the store is closed, gone (StoreGone) or full.
    """

    def set(self, key: str, value: bytes) -> None:
        """Give `key` this value, and wake every `get` that waits for it."""
        self._ask(StoreOp.SET, key, value=value)

    @abstractmethod
    def get(self, key: str, *, deadline: float) -> bytes:
        """Wait until `key` is set; return its value.

        StoreTimeout says that nobody set it before `deadline` (`time.monotonic()`); one that has passed asks once.
        """

    def add(self, key: str, amount: int) -> int:
        """Add to the number that `key` holds, atomically; return the sum.

        A missing key counts as 0. `get` returns the number as decimal ASCII. UsageError says that `key` holds something
        else, or that the sum does not fit 64 bits.
        """
        return self._ask(StoreOp.ADD, key, amount).number

    def delete(self, key: str) -> bool:
        """Remove `key`; return True if it was there."""
        return bool(self._ask(StoreOp.DELETE, key).number)

    def append_on_disconnect(self, key: str, value: bytes) -> None:
        """Have up to 1 KiB appended to the value of `key`, should this process end without `close`.

        Not even SIGKILL prevents it, and every `get` that waits for `key` is woken. Only a host that vanishes from the
        network is noticed no sooner than TCP itself notices. A missing key counts as empty. A store and all its views
        have one such value; UsageError says that they have it already.
        """
        self._ask(StoreOp.APPEND_ON_DISCONNECT, key, value=value)

    def prefix(self, name: str) -> Store:
        """Return a view of this store whose keys all begin with `name/`; views nest."""
        return PrefixStore(self, name)

    @abstractmethod
    def close(self) -> None:
        """Release the connections; idempotent. Closing a view leaves its store open."""

    @abstractmethod
    def _ask(self, op: StoreOp, key: str, number: int = 0, value: bytes = b"") -> Reply:
        """Check and make a request that is answered at once, which is any request but a GET."""


class PrefixStore(Store):
    """The keys of `store` that begin with `name/`; as thread-safe as `store` is."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def close(self) -> None:
        """Do nothing: the store is closed by its owner."""

    def _ask(self, op: StoreOp, key: str, number: int = 0, value: bytes = b"") -> Reply:
        return self._store._ask(op, f"{self._name}/{key}", number, value)

    def get(self, key: str, *, deadline: float) -> bytes:
        return self._store.get(f"{self._name}/{key}", deadline=deadline)


def checked_request(op: StoreOp, key: str, number: int = 0, value: bytes = b"") -> Request:
    """Make a request of arguments within a store's bounds; UsageError says that they are not."""
    try:
        encoded = key.encode()
    except (AttributeError, UnicodeEncodeError) as exc:
        raise UsageError(f"a store's key must be text that UTF-8 can hold, not {key!r}") from exc
    if not 0 < len(encoded) <= MAX_KEY_BYTES:
        raise UsageError(
            f"a store's key takes 1 to {MAX_KEY_BYTES} bytes, this one {len(encoded)}: {key[:40]!r}. Shorten it; large "
            "or many things belong in the value."
        )
    if not isinstance(value, bytes):
        raise UsageError(f"{op.name.lower()}({key!r}) takes bytes, not {type(value).__name__}: encode it first")
    if op is StoreOp.APPEND_ON_DISCONNECT and len(value) > MAX_APPEND_BYTES:
        raise UsageError(
            f"append_on_disconnect({key!r}) takes up to {MAX_APPEND_BYTES} bytes, not {len(value)}: a word that tells "
            "who is gone is enough"
        )
    if len(value) > MAX_VALUE_BYTES:
        raise UsageError(
            f"set({key!r}) was given {len(value)} bytes; a store's value takes at most {MAX_VALUE_BYTES}. Send large "
            "data with a collective, not through the store."
        )
    if not isinstance(number, int) or number not in INT64:
        raise UsageError(f"add({key!r}) takes a 64-bit integer, not {number!r}")
    return Request(op, encoded, number, value)
