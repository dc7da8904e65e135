"""What a store is: the few words that ranks share before they are connected."""

from __future__ import annotations

from typing import Protocol

from ferro.errors import FerroError


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
        """Give `key` this value, and wake whoever waits for it."""
        ...

    def get(self, key: str, *, deadline: float) -> bytes:
        """Wait until `key` is set; return its value.

        Args:
            key: what to look for.
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
        """Remove `key`; return whether it was there."""
        ...

    def will(self, key: str, value: bytes) -> None:
        """Have `value` appended to what `key` holds, should this process end without `close`.

        Not even SIGKILL prevents it, and whoever waits for `key` is woken. Only a host that
        vanishes from the network is noticed no sooner than TCP itself notices. `close` is the
        farewell: nothing is appended then. There is one will for a store and all its views.

        Args:
            key: what to append to; missing, it counts as empty.
            value: up to 1 KiB.

        Raises:
            UsageError: this store has a will already.
        """
        ...

    def prefix(self, name: str) -> Store:
        """A view of this store whose keys all begin with `name/`; views nest."""
        ...

    def close(self) -> None:
        """Release the connections; idempotent. Closing a view leaves its store open."""
        ...
